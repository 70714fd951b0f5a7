"""Which frozen parameters `freeze` froze itself, and which it found frozen.

A model may keep parameters frozen for good, such as Whisper's sinusoidal positions or a detector's
first layers. Freezing and unfreezing everything must not make these train. So each module has a
note that says, by the names of its own parameters, which of them `freeze` froze (True) and which
were frozen already while it froze others (False). A parameter frozen by hand has no entry.

The note is a frozenset of (name, bool) in the module's `__dict__`. deepcopy and pickle keep it, it
loads where torch_freeze is not installed, shallow copies of a module may share it, and torch.jit
leaves it out of a scripted module, where a dict would become an attribute. It never decides what is
frozen, which is up to `requires_grad`: an entry of a parameter that trains is void, and is dropped
when it is found.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from torch import nn

from ._tree import Tree

KEY = "_torch_freeze"


def read(tree: Tree) -> dict[int, bool]:
    """For each frozen parameter, by `id`, whether `freeze` froze it (True) or found it frozen.

    This drops the entries of parameters that train, so that they stay void if frozen by hand.
    """
    known: dict[int, bool] = {}
    for entry in tree.order:
        saved = entry.module.__dict__.get(KEY)
        if saved is None:
            continue
        note: dict[str, bool] = dict(saved)
        valid = 0
        for key, parameter in entry.module._parameters.items():
            if key in note and parameter is not None and not parameter.requires_grad:
                valid += 1
                # A tied parameter has an entry in each of its owners that freeze has seen.
                known[id(parameter)] = note[key] or known.get(id(parameter), False)
        if valid < len(note):
            own = entry.module._parameters.items()
            frozen = {key for key, p in own if p is not None and not p.requires_grad}
            _put(entry.module, {key: froze for key, froze in note.items() if key in frozen})
    return known


def write(tree: Tree, marks: Mapping[int, bool]) -> None:
    """Add `marks`, by `id` of the parameter, to the note of every module that owns one."""
    if not marks:
        return
    for entry in tree.order:
        if not entry.params:
            continue
        own = entry.module._parameters.items()
        note = {key: marks[id(p)] for key, p in own if p is not None and id(p) in marks}
        if note:
            _put(entry.module, {**_note(entry.module), **note})


def drop(tree: Tree, thawed: Set[int]) -> None:
    """Drop the entries of parameters (by `id`) that were made trainable."""
    for entry in tree.order:
        if KEY not in entry.module.__dict__ or not any(
            id(e.parameter) in thawed for e in entry.params
        ):
            continue
        gone = {key for key, p in entry.module._parameters.items() if id(p) in thawed}
        note = _note(entry.module)
        _put(entry.module, {key: froze for key, froze in note.items() if key not in gone})


def snapshot(tree: Tree) -> list[tuple[nn.Module, dict[str, bool]]]:
    """Every module with its note, for `restore`."""
    return [(entry.module, _note(entry.module)) for entry in tree.order]


def restore(before: list[tuple[nn.Module, dict[str, bool]]]) -> None:
    for module, note in before:
        _put(module, note)


def _note(module: nn.Module) -> dict[str, bool]:
    return dict(module.__dict__.get(KEY, ()))


def _put(module: nn.Module, note: dict[str, bool]) -> None:
    # Written to __dict__ directly, past a module's __setattr__.
    if note:
        module.__dict__[KEY] = frozenset(note.items())
    else:
        module.__dict__.pop(KEY, None)

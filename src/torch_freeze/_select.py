"""Selectors: find the parameters and modules of a model that a user names."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from . import _format
from ._tree import ModuleEntry, ParamEntry, Tree, unwrap

#: A glob, a regex, a module or parameter of the model, a module class, or a callable
#: (name, parameter) -> bool; or an iterable of these.
Selector: TypeAlias = (
    str
    | re.Pattern[str]
    | nn.Module
    | torch.Tensor
    | type[nn.Module]
    | Callable[[str, nn.Parameter], bool]
    | Iterable["Selector"]
)


@dataclass(slots=True)
class Selection:
    """What selectors name: parameters, modules, and the names that matched."""

    params: dict[int, ParamEntry] = field(default_factory=dict)
    modules: dict[int, ModuleEntry] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    #: Modules that a selector named itself, without those below them, in the order named.
    heads: dict[int, ModuleEntry] = field(default_factory=dict)
    #: For each argument (a list counts as one) the modules and parameters that it named.
    units: list[list[ModuleEntry | ParamEntry]] = field(default_factory=list)

    def begin_unit(self) -> None:
        """Begin a new argument, which names what is added from now on."""
        self.units.append([])

    def add_param(self, entry: ParamEntry) -> None:
        self.params[id(entry)] = entry
        if self.units:
            self.units[-1].append(entry)

    def add_module(self, entry: ModuleEntry, seen: set[int]) -> None:
        self.heads[id(entry)] = entry
        if self.units:
            self.units[-1].append(entry)
        for below in entry.subtree(seen):
            self.modules[id(below)] = below
            for param in below.params:
                self.params[id(param)] = param

    def named_alias(self, alias: str) -> bool:
        """Whether this name of a tied parameter, or a module around it, was named."""
        if "" in self.names:
            return True
        parts = alias.split(".")
        return any(".".join(parts[:n]) in self.names for n in range(1, len(parts) + 1))


def flatten(what: Iterable[Selector]) -> list[Selector]:
    """Selectors as a flat list, without the lists, tuples and generators around them."""
    flat: list[Selector] = []
    for item in what:
        # Modules and tensors are iterable too, but are selectors themselves. bytes would become
        # ints, and the error would not show what was given.
        if isinstance(item, (str, bytes, bytearray, re.Pattern, nn.Module, torch.Tensor, type)):
            flat.append(item)
        elif isinstance(item, Iterable):
            flat.extend(flatten(item))
        else:
            flat.append(item)
    return flat


def everything(tree: Tree) -> Selection:
    """All modules and parameters."""
    selection = Selection()
    selection.names.add("")
    selection.begin_unit()
    selection.add_module(tree.root, set())
    return selection


def as_selectors(what: Selector) -> list[Selector]:
    """One selector, or an iterable of them, as a flat list."""
    return flatten([what])


def select(tree: Tree, what: Iterable[Selector], caller: str) -> Selection:
    """Resolve selectors, or lists of them. Each must match something.

    Raises:
        ValueError: a selector matches nothing; the message has the nearest names.
        TypeError: a selector has an unknown type.
    """
    selection = Selection()
    seen: set[int] = set()
    for item in what:
        selection.begin_unit()
        for one in flatten([item]):
            _select_one(tree, one, selection, seen, caller)
    return selection


def _select_one(
    tree: Tree, item: Selector, selection: Selection, seen: set[int], caller: str
) -> None:
    if isinstance(item, str):
        if not _add(_by_name(tree, item), selection, seen):
            raise ValueError(_no_match(tree, item, caller))
    elif isinstance(item, re.Pattern):
        if not isinstance(item.pattern, str):
            raise TypeError(f"{caller}: the regex {item.pattern!r} is over bytes; names are str.")
        if not _add(tree.names.matching(item.search), selection, seen):
            raise ValueError(_no_match(tree, item, caller))
    elif isinstance(item, nn.Module):
        entry = tree.modules.get(id(item)) or tree.modules.get(id(unwrap(item)))
        if entry is None:
            raise ValueError(
                f"{caller}: the given {type(item).__name__} is not part of this model "
                f"({type(tree.root.module).__name__}); pass one of its own modules or a name."
            )
        selection.names.update(entry.names)
        selection.add_module(entry, seen)
    elif isinstance(item, torch.Tensor):
        owned = tree.params.get(id(item))
        if owned is None:
            raise ValueError(
                f"{caller}: the given tensor of shape {list(item.shape)} is not a parameter of "
                f"this model ({type(tree.root.module).__name__}); pass one of its own parameters "
                f"or a name.{_if_parametrized(tree)}"
            )
        selection.names.update(owned.names)
        selection.add_param(owned)
    elif isinstance(item, type):
        if not issubclass(item, nn.Module):
            raise TypeError(f"{caller}: {item.__name__} is not a class of modules.")
        found_any = False
        for module in tree.order:
            if isinstance(module.module, item):
                found_any = True
                selection.names.update(module.names)
                selection.add_module(module, seen)
        if not found_any:
            kinds = Counter(type(m.module).__name__ for m in tree.order)
            near = ", ".join(f"{kind} ({n})" for kind, n in kinds.most_common(6))
            raise ValueError(
                f"{caller}: the model has no module of class {item.__name__}; it has {near}."
            )
    elif callable(item):
        found_any = False
        for owned in tree.params.values():
            matched = [name for name in owned.names if item(name, owned.parameter)]
            if matched:
                found_any = True
                selection.names.update(matched)
                selection.add_param(owned)
        if not found_any:
            called = getattr(item, "__name__", type(item).__name__)
            raise ValueError(
                f"{caller}: the callable {called} is true for none of the model's "
                f"{_format.counted(len(tree.params), 'parameter')}."
            )
    else:
        raise TypeError(
            f"{caller}: cannot select by {type(item).__name__}; give a name or glob, a compiled "
            "regex, a module, a parameter, a module class or a callable (name, parameter) -> bool."
        )


def _if_parametrized(tree: Tree) -> str:
    """What to name instead of a weight that a parametrization computes, if there are any."""
    lists = [e.name for e in tree.order if isinstance(e.module, ParametrizationList)]
    if not lists:
        return ""
    named = ", ".join(map(repr, lists[:3])) + (", ..." if len(lists) > 3 else "")
    return f" For a parametrized weight, name what it is computed from: {named}."


def _by_name(tree: Tree, pattern: str) -> list[tuple[ModuleEntry | ParamEntry, str]]:
    # A name may contain glob characters (a ParameterDict key); an exact match takes precedence.
    found = tree.names.exactly(pattern)
    literal = re.split(r"[*?[]", pattern, maxsplit=1)[0]
    if found or literal == pattern:
        return found
    return tree.names.matching(re.compile(fnmatch.translate(pattern)).match, literal)


def _add(
    found: list[tuple[ModuleEntry | ParamEntry, str]], selection: Selection, seen: set[int]
) -> bool:
    added = False
    for entry, name in found:
        # The model itself has no name, so "*" matches everything in it but not the model.
        if not name:
            continue
        added = True
        selection.names.add(name)
        if isinstance(entry, ModuleEntry):
            selection.add_module(entry, seen)
        else:
            selection.add_param(entry)
    return added


def _no_match(tree: Tree, pattern: str | re.Pattern[str], caller: str) -> str:
    text = pattern if isinstance(pattern, str) else pattern.pattern
    kind = "pattern" if isinstance(pattern, str) else "regex"
    near = nearest(tree, text)
    said = f"{caller}: the {kind} {text!r} matches no parameter or module of this model. "
    if near:
        return said + "Nearest: " + ", ".join(repr(name) for name in near) + "."
    top = [child.name for child in tree.root.children[:6]]
    top += [param.name for param in tree.root.params[:6]]
    return said + "Its top level has: " + (", ".join(map(repr, top)) or "nothing") + "."


def nearest(tree: Tree, text: str) -> list[str]:
    """Up to three patterns that match something and look like `text`."""
    if not text:
        return []
    # Numbered siblings become one pattern with a star, to keep the search in a large model fast.
    folded: dict[str, None] = {}
    literal: dict[str, None] = {}
    named: list[ModuleEntry | ParamEntry] = [*tree.order, *tree.params.values()]
    for entry in named:
        for name in entry.names:
            if not name:
                continue
            if len(literal) < 4000:
                literal[name] = None
            folded[re.sub(r"(?<![^.])\d+(?![^.])", "*", name)] = None
    last = {name.rsplit(".", 1)[-1] for name in folded}
    tail = text.strip(".*")
    # A parametrized weight is no longer a parameter; what it is computed from has this name.
    layer, dot, key = text.rpartition(".")
    parametrized = f"{layer}{dot}parametrizations.{key}"
    found = [parametrized] if parametrized in literal else []
    if tail in last and text != f"*.{tail}":
        found.append(f"*.{tail}")
    pool = list(folded) if "*" in text else list(literal)
    found += difflib.get_close_matches(text, pool, n=3, cutoff=0.6)
    if len(found) < 2:
        found += difflib.get_close_matches(text, list(folded), n=2, cutoff=0.6)
    if not found:
        close = difflib.get_close_matches(tail, last, n=2, cutoff=0.6)
        found = [name if name in literal else f"*.{name}" for name in close]
    if tail and any(tail in name for name in folded):
        found.append(f"*{tail}*")
    return list(dict.fromkeys(found))[:3]

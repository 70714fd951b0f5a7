"""A schedule as a small JSON file that people can edit: its arguments, without its position."""

from __future__ import annotations

import difflib
import inspect
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ._select import Selector, flatten, select
from ._tree import Tree, check_model
from .plateau import AdvanceOnPlateau
from .schedule import FreezeSchedule, freeze_out, gradual_unfreeze, rotate

_KINDS: dict[str, Callable[..., FreezeSchedule]] = {
    "FreezeSchedule": FreezeSchedule,
    "gradual_unfreeze": gradual_unfreeze,
    "freeze_out": freeze_out,
    "rotate": rotate,
    "AdvanceOnPlateau": AdvanceOnPlateau,
}
_FLAGS = ("hold_norm", "scale_lr", "restore_best")


def export_schedule(schedule: FreezeSchedule, path: str | os.PathLike[str]) -> None:
    """Write a schedule to a JSON file, which `read_schedule` reads and people can edit.

    The file contains, under "type", the function or class that makes the schedule, and its
    arguments. Names and globs are written as given, a regular expression as {"regex": "..."}, and
    modules, parameters, classes and functions as the names they match in this model. The position
    in the schedule is not written; it is in `state_dict()`.

    Args:
        schedule: any schedule of this package.
        path: the file. An existing file is replaced once the new one is complete.

    Raises:
        TypeError: `schedule` is not a schedule of this package.
        ValueError: the file has the name of a YAML file.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from torch_freeze import export_schedule, gradual_unfreeze, read_schedule
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
        >>> schedule = gradual_unfreeze(model, ["0", model[1]], every=2)
        >>> path = tempfile.mkdtemp() + "/plan.json"
        >>> export_schedule(schedule, path)
        >>> print(open(path).read(), end="")
        {
          "type": "gradual_unfreeze",
          "groups": [
            ["0"],
            ["1"]
          ],
          "every": 2,
          "unit": "epoch",
          "hold_norm": true
        }
        >>> again = read_schedule(model, path)
        >>> again.step(), [layer.weight.requires_grad for layer in model]
        (True, [False, True])
    """
    if not isinstance(schedule, FreezeSchedule):
        raise TypeError(
            f"export_schedule: the first argument is the schedule; got {type(schedule).__name__}."
        )
    path = _check_path(path, "export_schedule")
    text = _layout(_written(schedule, Tree(schedule.model))) + "\n"
    # Written to the same folder first, so that a full disk does not destroy the old file.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes a file that nobody else can read. Give it the usual mode.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_schedule(model: nn.Module, path: str | os.PathLike[str]) -> FreezeSchedule:
    """Make the schedule that a JSON file describes, for this model.

    The file contains an object. Its "type" is "FreezeSchedule", "gradual_unfreeze", "freeze_out",
    "rotate" or "AdvanceOnPlateau"; the other keys are the arguments of that function, without the
    model. Arguments that have defaults may be left out. The unit numbers of a FreezeSchedule are
    strings, as JSON requires. A table whose entries follow a metric:

        {
          "type": "AdvanceOnPlateau",
          "schedule": {
            "type": "FreezeSchedule",
            "entries": {"0": ["encoder.*", "embeddings"], "1": ["embeddings"], "2": []}
          },
          "mode": "max",
          "patience": 2,
          "restore_best": true
        }

    Args:
        model: the model.
        path: the file.

    Returns:
        The schedule at its beginning. It can load the state of the schedule that was exported.

    Raises:
        ValueError: the file is not JSON, or its content is wrong: an unknown type or argument
            (with the nearest), a missing one, a name that matches nothing. The message names the
            file and the place in it.
        TypeError: `model` is not a module, or an argument has the wrong type.
        OSError: the file cannot be read.
    """
    check_model(model, "read_schedule")
    path = _check_path(path, "read_schedule")
    where = f"read_schedule: {path}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is not JSON: {error}.") from error
    except _TwiceError as error:
        raise ValueError(f"{where} has the key {error} twice; give it only once.") from error
    try:
        return _made(model, content, "")
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error


class _TwiceError(Exception):
    """A key that occurs twice in one object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _TwiceError(repr(key))
        found[key] = value
    return found


def _check_path(path: str | os.PathLike[str], caller: str) -> Path:
    path = Path(path)
    if path.suffix in (".yaml", ".yml"):
        raise ValueError(
            f"{caller}: {path} is named as a YAML file; schedules are in JSON: name it "
            f"{path.with_suffix('.json').name}."
        )
    return path


def _made(model: nn.Module, content: object, at: str) -> FreezeSchedule:
    """The schedule that an object of the file describes; `at` is its place in the file."""
    here = f"{at}: " if at else ""
    if not isinstance(content, dict):
        raise ValueError(
            f'{here}a schedule is an object, such as {{"type": "gradual_unfreeze", "groups": '
            f'[["encoder"], ["head"]]}}; this is {_kind(content)}.'
        )
    kinds = ", ".join(map(repr, _KINDS))
    if "type" not in content:
        raise ValueError(f"{here}the key 'type' is missing; it is one of {kinds}.")
    kind = content["type"]
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"{here}the 'type' is {kind!r}; it must be one of {kinds}.")
    signature = inspect.signature(_KINDS[kind]).parameters
    known = [name for name in signature if name != "model"]
    for key in content:
        if key not in known and key != "type":
            near = difflib.get_close_matches(key, known, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(
                f"{here}{kind} has no argument {key!r}{meant} It has {', '.join(known)}."
            )
    for name in known:
        if name not in content and signature[name].default is inspect.Parameter.empty:
            raise ValueError(f"{here}{kind} needs the key {name!r}.")
    dot = f"{at}." if at else ""
    arguments = {
        name: _read(model, name, value, f"{dot}{name}")
        for name, value in content.items()
        if name != "type"
    }
    try:
        if kind == "AdvanceOnPlateau":
            return AdvanceOnPlateau(**arguments)
        return _KINDS[kind](model, **arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{here}{error}") from error


def _read(model: nn.Module, name: str, value: Any, at: str) -> Any:
    """Convert a value of the file to an argument."""
    if name == "schedule":
        return _made(model, value, at)
    if name == "entries":
        if not isinstance(value, dict):
            raise ValueError(
                f'{at} must be an object of unit numbers, such as {{"0": ["encoder"], "3": []}}; '
                f"it is {_kind(value)}."
            )
        for key in value:
            if not re.fullmatch(r"\d+", key):
                raise ValueError(
                    f"{at} has the key {key!r}; its keys are unit numbers, such as '0'."
                )
        numbered = {int(key): _selector(item, f"{at}[{key!r}]") for key, item in value.items()}
        if len(numbered) < len(value):
            raise ValueError(f"{at} has one unit number in two spellings: {', '.join(value)}.")
        return numbered
    if name == "groups":
        if not isinstance(value, list):
            raise ValueError(
                f'{at} must be a list of groups, such as [["encoder"], ["head"]]; it is '
                f"{_kind(value)}."
            )
        return [_selector(item, f"{at}[{i}]") for i, item in enumerate(value)]
    if name in ("layers", "always"):
        return _selector(value, at)
    if name in _FLAGS and not isinstance(value, bool):
        raise ValueError(f"{at} must be true or false; it is {json.dumps(value)}.")
    return value


def _selector(value: Any, at: str) -> Selector:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return [_selector(item, f"{at}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict) and list(value) == ["regex"] and isinstance(value["regex"], str):
        try:
            return re.compile(value["regex"])
        except re.error as error:
            raise ValueError(
                f"{at}: {value['regex']!r} is not a regular expression: {error}."
            ) from error
    raise ValueError(
        f'{at} must be a name or glob, {{"regex": "..."}} or a list of these; it is {_kind(value)}.'
    )


def _kind(value: object) -> str:
    """A short description of a value of the file."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value)


def _written(schedule: FreezeSchedule, tree: Tree) -> dict[str, Any]:
    kind, arguments = schedule.arguments()
    written: dict[str, Any] = {"type": kind}
    for name, value in arguments.items():
        if name == "schedule":
            written[name] = _written(value, tree)
        elif name == "entries":
            written[name] = {str(number): _named(tree, items) for number, items in value.items()}
        elif name == "groups":
            written[name] = [_named(tree, group) for group in value]
        elif name in ("layers", "always"):
            written[name] = _named(tree, value)
        else:
            written[name] = value
    return written


def _named(tree: Tree, items: Iterable[Selector]) -> list[Any]:
    """Selectors in the form that the file has."""
    named: list[Any] = []
    for item in flatten(items):
        if isinstance(item, str):
            named.append(item)
        elif isinstance(item, re.Pattern) and item.flags == re.UNICODE:
            named.append({"regex": item.pattern})
        else:
            found = select(tree, [item], "export_schedule")
            heads = [entry.name or "*" for entry in found.heads.values()]
            inside = {id(p) for entry in found.modules.values() for p in entry.params}
            alone = [entry.name for key, entry in found.params.items() if key not in inside]
            named += heads + alone
    return named


def _layout(content: Mapping[str, Any], indent: int = 0) -> str:
    """JSON for people: a list is on one line if it fits."""
    inner = " " * (indent + 2)
    lines = []
    for key, value in content.items():
        lines.append(f"{inner}{json.dumps(key)}: {_value(value, indent + 2)}")
    return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"


def _value(value: Any, indent: int) -> str:
    flat = json.dumps(value, ensure_ascii=False)
    nested = isinstance(value, list) and any(isinstance(item, list) for item in value)
    if isinstance(value, dict) and "regex" not in value:
        return _layout(value, indent) if value else "{}"
    if not isinstance(value, list) or (len(flat) + indent <= 88 and not nested):
        return flat
    inner = " " * (indent + 2)
    items = [f"{inner}{_value(item, indent + 2)}" for item in value]
    return "[\n" + ",\n".join(items) + "\n" + " " * indent + "]"

"""Names to parameters: one walk over a model, and the selectors resolved against it."""

from __future__ import annotations

import difflib
import fnmatch
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

#: What a user may name: a glob, a regex, a module or parameter of the model, a module class, or a
#: callable (name, parameter) -> bool; or an iterable of these.
Selector: TypeAlias = (
    str
    | re.Pattern[str]
    | nn.Module
    | torch.Tensor
    | type[nn.Module]
    | Callable[[str, nn.Parameter], bool]
    | Iterable["Selector"]
)

# Wrappers register the user's model as a child under these names. The underscored ones are
# private to torch; "module" is an ordinary word, so there the wrapper's class decides.
_WRAPPER_CHILDREN = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def wrapped_child(module: nn.Module) -> str | None:
    """The name under which a wrapper (DDP, compile, FSDP1, checkpointing) keeps the real module."""
    for name in _WRAPPER_CHILDREN:
        if name in module._modules:
            return name
    if isinstance(module, (DistributedDataParallel, DataParallel)):
        return "module"
    return None


def unwrap(module: nn.Module) -> nn.Module:
    """The module under any number of wrappers."""
    while (name := wrapped_child(module)) is not None:
        inner = module._modules[name]
        if inner is None:
            break
        module = inner
    return module


def is_lazy(tensor: torch.Tensor) -> bool:
    """Whether a lazy module's parameter or buffer has no shape yet."""
    # By type: isinstance() of a parameter class is slow, and is true of more than its instances.
    return type(tensor) in (UninitializedParameter, UninitializedBuffer)


class ParamEntry:
    """One parameter and every name it has; the first name is the one reports use."""

    # A model has thousands of these: plain slots, and few objects for the garbage collector.
    __slots__ = ("aliases", "first_place", "last_place", "name", "parameter", "raw_names")

    def __init__(self, parameter: nn.Parameter, name: str, place: int) -> None:
        self.parameter = parameter
        self.name = name
        #: Further names, of a tied parameter.
        self.aliases: tuple[str, ...] = ()
        #: Names with the wrappers' segments, where there are any, to those without.
        self.raw_names: dict[str, str] | None = None
        #: Where in the order of registration the first and the last of its names stand.
        self.first_place = self.last_place = place

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


class ModuleEntry:
    """One module, every name it has, and what it owns directly."""

    # No reference upwards: a cycle would keep the model alive until the next garbage collection.
    __slots__ = ("aliases", "children", "module", "name", "params", "parent", "raw_names")

    def __init__(self, module: nn.Module, name: str, parent: int) -> None:
        self.module = module
        self.name = name
        self.aliases: tuple[str, ...] = ()
        self.raw_names: dict[str, str] | None = None
        #: Place in Tree.order of the module it is first registered in; -1 for the model.
        self.parent = parent
        self.params: Sequence[ParamEntry] = ()
        self.children: Sequence[ModuleEntry] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    def subtree(self, seen: set[int]) -> Iterator[ModuleEntry]:
        """Self and all modules below that are not in `seen` yet, in registration order."""
        stack = [self]
        while stack:
            entry = stack.pop()
            if id(entry) in seen:
                continue
            seen.add(id(entry))
            yield entry
            if entry.children:
                stack.extend(reversed(entry.children))

    def parameters(self) -> list[ParamEntry]:
        """The parameters of the subtree, each once, in registration order."""
        if not self.children:
            return list(self.params)
        found = {id(p): p for entry in self.subtree(set()) for p in entry.params}
        return list(found.values())


class Tree:
    """A model's modules and parameters by identity, with all their names, from a single walk.

    Names leave out the wrappers' segments ("module.", "_orig_mod."); `raw_names` keep them.
    Parameters are distinguished by identity, never by value: two equal layers are two layers.

    Attributes:
        params: by `id` of the parameter, in registration order.
        modules: by `id` of the module; a wrapper stands for what it wraps.
        order: every module once, in registration order, parents before what they hold.
        root: the model, under its wrappers.
        ddp: the DistributedDataParallel wrappers met.
    """

    def __init__(self, model: nn.Module) -> None:
        self.params: dict[int, ParamEntry] = {}
        self.modules: dict[int, ModuleEntry] = {}
        self.order: list[ModuleEntry] = []
        self.ddp: list[nn.Module] = []
        self._names: _Names | None = None
        self._places = 0
        self.root = self._walk(model, "", "", -1)

    def _walk(self, module: nn.Module, name: str, raw: str, parent: int) -> ModuleEntry:
        # `name` and `raw` end in a dot, ready to prefix what lies below.
        below = module._modules
        if below and (child := wrapped_child(module)) and (inner := below[child]) is not None:
            if isinstance(module, DistributedDataParallel):
                self.ddp.append(module)
            entry = self._walk(inner, name, f"{raw}{child}.", parent)
            # A wrapper is found by identity too: freeze(model, compiled_block).
            self.modules[id(module)] = entry
            return entry
        known = self.modules.get(id(module))
        index = len(self.order)
        if known is None:
            entry = self.modules[id(module)] = ModuleEntry(module, name[:-1], parent)
            self.order.append(entry)
        else:
            entry = known
            entry.aliases += (name[:-1],)
        if raw != name:
            entry.raw_names = {**(entry.raw_names or {}), raw[:-1]: name[:-1]}
        own = []
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            param = self.params.get(id(parameter))
            if param is None:
                param = ParamEntry(parameter, name + key, self._places)
                self.params[id(parameter)] = param
            else:
                param.aliases += (name + key,)
                param.last_place = self._places
            self._places += 1
            if raw != name:
                param.raw_names = {**(param.raw_names or {}), raw + key: name + key}
            own.append(param)
        found = [
            self._walk(sub, f"{name}{key}.", f"{raw}{key}.", index)
            for key, sub in below.items()
            if sub is not None
        ]
        if known is None:
            entry.params = own or ()
            entry.children = found or ()
        return entry

    def above(self, entry: ModuleEntry) -> Iterator[ModuleEntry]:
        """The modules around `entry`, from the inside out."""
        while entry.parent >= 0:
            entry = self.order[entry.parent]
            yield entry

    def everything(self) -> Selection:
        """All modules and parameters."""
        selection = Selection()
        selection.names.add("")
        selection.begin_unit()
        selection.add_module(self.root, set())
        return selection

    @property
    def names(self) -> _Names:
        """All names, looked up without a walk over the model."""
        if self._names is None:
            self._names = _Names([*self.order, *self.params.values()])
        return self._names

    def parameter_named(self, name: str) -> ParamEntry | None:
        """The parameter with this name, whichever of its names it is."""
        found = self.names.exactly(name)
        params = [(own == name, entry) for entry, own in found if isinstance(entry, ParamEntry)]
        # A name with the wrappers' segments may be another parameter's without, whose it is then.
        return max(params, key=lambda pair: pair[0])[1] if params else None

    def tied(self) -> list[ParamEntry]:
        """Parameters that have more than one name."""
        return [entry for entry in self.params.values() if entry.aliases]


class _Names:
    """Every name in a tree, with and without the wrappers' segments.

    Thousands of listed names, as a schedule may have, are each found without looking at all others;
    so are the names that a glob may match, when it begins with something literal.
    """

    def __init__(self, entries: list[ModuleEntry | ParamEntry]) -> None:
        self._entries = entries
        self._places: dict[str, tuple[int, ...]] = {}
        for place, entry in enumerate(entries):
            for name in (entry.name, *entry.aliases, *(entry.raw_names or ())):
                known = self._places.get(name, ())
                if place not in known:
                    self._places[name] = (*known, place)
        self._sorted: list[str] | None = None

    def exactly(self, name: str) -> list[tuple[ModuleEntry | ParamEntry, str]]:
        """What has this name, and the name without the wrappers' segments."""
        return self._own((place, name) for place in self._places.get(name, ()))

    def matching(
        self, matches: Callable[[str], object], prefix: str = ""
    ) -> list[tuple[ModuleEntry | ParamEntry, str]]:
        """What has a matching name, modules first; `prefix` is one that all such names have."""
        names: Iterable[str] = self._places
        if prefix:
            if self._sorted is None:
                self._sorted = sorted(self._places)
            first = bisect_left(self._sorted, prefix)
            behind = bisect_left(self._sorted, True, first, key=lambda n: not n.startswith(prefix))
            names = self._sorted[first:behind]
        return self._own(
            sorted((place, name) for name in names if matches(name) for place in self._places[name])
        )

    def _own(self, found: Iterable[tuple[int, str]]) -> list[tuple[ModuleEntry | ParamEntry, str]]:
        own = []
        for place, name in found:
            entry = self._entries[place]
            if name in entry.names:
                own.append((entry, name))
            if entry.raw_names and name in entry.raw_names:
                own.append((entry, entry.raw_names[name]))
        return own


@dataclass(slots=True)
class Selection:
    """What selectors name: parameters, the modules they lie in, and the names that matched."""

    params: dict[int, ParamEntry] = field(default_factory=dict)
    modules: dict[int, ModuleEntry] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    #: Modules that a selector named itself, in the order named (not what lies below them).
    heads: dict[int, ModuleEntry] = field(default_factory=dict)
    #: For each argument, a list of selectors being one: the modules and parameters it named.
    units: list[list[ModuleEntry | ParamEntry]] = field(default_factory=list)

    def begin_unit(self) -> None:
        """What is added from here on was named by another argument than what was so far."""
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
        """Whether this very name of a tied parameter, or a module above it, was named."""
        if "" in self.names:
            return True
        parts = alias.split(".")
        return any(".".join(parts[:n]) in self.names for n in range(1, len(parts) + 1))


def check_model(model: object, caller: str) -> nn.Module:
    """`model` if it is one, else a TypeError that shows the call that was meant."""
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, str):
        raise TypeError(
            f"{caller}: the first argument is the model; got the str {model!r}. "
            f"Write {caller}(model, {model!r})."
        )
    raise TypeError(
        f"{caller}: the first argument is the model (a torch.nn.Module); "
        f"got {type(model).__name__}."
    )


def flatten(what: Iterable[Selector]) -> list[Selector]:
    """Selectors with lists, tuples and generators of selectors opened up."""
    flat: list[Selector] = []
    for item in what:
        # Modules and tensors are iterable as well, but stand for themselves here.
        # Of bytes only integers would be left to name in an error.
        if isinstance(item, (str, bytes, bytearray, re.Pattern, nn.Module, torch.Tensor, type)):
            flat.append(item)
        elif isinstance(item, Iterable):
            flat.extend(flatten(item))
        else:
            flat.append(item)
    return flat


def counted(number: int, noun: str, shown: str = "") -> str:
    """A number with its noun, "1 norm" or "2 norms"; `shown` is the number as it is to be read."""
    return f"{shown or number} {noun}{'s' * (number != 1)}"


def as_selectors(what: Selector) -> list[Selector]:
    """`exclude` and its like: one selector or an iterable of them, as a flat list."""
    return flatten([what])


def select(tree: Tree, what: Iterable[Selector], caller: str) -> Selection:
    """Resolve selectors, or lists of them; each must match something.

    Raises:
        ValueError: a selector matches nothing; the message has the nearest names.
        TypeError: a selector is of no known kind.
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
                f"{counted(len(tree.params), 'parameter')}."
            )
    else:
        raise TypeError(
            f"{caller}: cannot select by {type(item).__name__}; give a name or glob, a compiled "
            "regex, a module, a parameter, a module class or a callable (name, parameter) -> bool."
        )


def _if_parametrized(tree: Tree) -> str:
    """What to name in place of a tensor that a parametrization computes, if the model has any."""
    lists = [e.name for e in tree.order if isinstance(e.module, ParametrizationList)]
    if not lists:
        return ""
    named = ", ".join(map(repr, lists[:3])) + (", ..." if len(lists) > 3 else "")
    return f" For a parametrized weight name what it is computed from: {named}."


def _by_name(tree: Tree, pattern: str) -> list[tuple[ModuleEntry | ParamEntry, str]]:
    # A name may itself hold glob characters (ParameterDict keys): what exists is meant literally.
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
        # The model itself has no name: "*" is all in it, and no module of its own.
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
    """Up to three patterns that do match and look like `text`."""
    if not text:
        return []
    # Numbered siblings are folded into one star so that a large model stays quick to search.
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
    # A parametrized weight is no parameter any more; what it is computed from lies here.
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

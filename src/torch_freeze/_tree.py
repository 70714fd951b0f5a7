"""A model's modules and parameters with all their names, from one walk over it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

# Wrappers register the user's model as a child under these names, which are private to torch. Some
# use "module", which others use too, so those wrappers are recognized by their class.
_WRAPPER_CHILDREN = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def wrapped_child(module: nn.Module) -> str | None:
    """The name under which a wrapper (DDP, compile, FSDP1, checkpointing) keeps its module."""
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
    # isinstance() of a parameter class is slow, and true of more than its instances.
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
        #: Maps names with wrappers' segments to those without; None if there are no wrappers.
        self.raw_names: dict[str, str] | None = None
        #: Positions of its first and its last name in the order of registration.
        self.first_place = self.last_place = place

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def numel(self) -> int:
        """Its number of elements; 0 while it is lazy.

        Of a table with frozen rows, the elements of those: the others are a parameter of their own.
        """
        if is_lazy(self.parameter):
            return 0
        table = getattr(self.parameter, "_rows", None)
        numel = self.parameter.numel()
        return numel if table is None else numel // len(self.parameter) * table.frozen


class ModuleEntry:
    """One module, every name it has, and what it owns directly."""

    # There is no reference to the parent entry: a cycle would keep the model alive until the next
    # garbage collection.
    __slots__ = ("aliases", "children", "module", "name", "params", "parent", "raw_names")

    def __init__(self, module: nn.Module, name: str, parent: int) -> None:
        self.module = module
        self.name = name
        self.aliases: tuple[str, ...] = ()
        self.raw_names: dict[str, str] | None = None
        #: Index in Tree.order of the module it is first registered in; -1 for the model.
        self.parent = parent
        self.params: Sequence[ParamEntry] = ()
        self.children: Sequence[ModuleEntry] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    def subtree(self, seen: set[int]) -> Iterator[ModuleEntry]:
        """Self and all modules below it that are not yet in `seen`, in registration order."""
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
    Parameters are told apart by identity, never by value: two equal layers are two layers.

    Attributes:
        params: parameters by `id`, in registration order.
        modules: modules by `id`; a wrapper's `id` leads to the module it wraps.
        order: every module once, in registration order, parents before children.
        root: the model, under its wrappers.
        ddp: the DistributedDataParallel wrappers found.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.params: dict[int, ParamEntry] = {}
        self.modules: dict[int, ModuleEntry] = {}
        self.order: list[ModuleEntry] = []
        self.ddp: list[nn.Module] = []
        self._names: _Names | None = None
        self._places = 0
        self.root = self._walk(model, "", "", -1)

    def walk_again(self) -> None:
        """Walk the model again, after its modules or parameters have changed."""
        Tree.__init__(self, self._model)

    def _walk(self, module: nn.Module, name: str, raw: str, parent: int) -> ModuleEntry:
        # `name` and `raw` are prefixes: they end in a dot unless they are empty.
        below = module._modules
        if below and (child := wrapped_child(module)) and (inner := below[child]) is not None:
            if isinstance(module, DistributedDataParallel):
                self.ddp.append(module)
            entry = self._walk(inner, name, f"{raw}{child}.", parent)
            # A wrapper may be selected too: freeze(model, compiled_block).
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
        """The modules around `entry`, innermost first."""
        while entry.parent >= 0:
            entry = self.order[entry.parent]
            yield entry

    @property
    def names(self) -> _Names:
        """All names, for a lookup that does not walk the model."""
        if self._names is None:
            self._names = _Names([*self.order, *self.params.values()])
        return self._names

    def parameter_named(self, name: str) -> ParamEntry | None:
        """The parameter that has this name as any of its names."""
        found = self.names.exactly(name)
        params = [(own == name, entry) for entry, own in found if isinstance(entry, ParamEntry)]
        # If a name with wrappers' segments is also another parameter's name without, that one wins.
        return max(params, key=lambda pair: pair[0])[1] if params else None

    def tied(self) -> list[ParamEntry]:
        """Parameters that have more than one name."""
        return [entry for entry in self.params.values() if entry.aliases]


class _Names:
    """Every name in a tree, with and without the wrappers' segments.

    A lookup does not scan all names, since a schedule may list thousands. Neither does a glob that
    begins with literal characters.
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
        """The entries with this name, each with that name less the wrappers' segments."""
        return self._own((place, name) for place in self._places.get(name, ()))

    def matching(
        self, matches: Callable[[str], object], prefix: str = ""
    ) -> list[tuple[ModuleEntry | ParamEntry, str]]:
        """The entries with a matching name, modules first; all such names begin with `prefix`."""
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


def check_model(model: object, caller: str) -> nn.Module:
    """Return `model` if it is one, else raise a TypeError that shows the call that was meant."""
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

"""guard: raise when something frozen changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import _format
from ._hold import held_by, is_norm
from ._tree import ModuleEntry, Tree, check_model, is_lazy
from .rows import RowFrozenParameter, frozen_rows

# Tensors of at most this many bytes are compared in full, larger ones by this many sums.
_SMALL = 4096
_SUMS = 64


@contextmanager
def guard(model: nn.Module, *, content: bool = False) -> Iterator[None]:
    """Raise, naming them, if a frozen parameter or held statistic changes inside the block.

    The guard watches the parameters that are frozen on entry (of a table with frozen rows, those
    rows) and the buffers of norms that are held. It notices a changed version counter (which
    torch's in-place operations raise, also when they write equal values), a changed address,
    changed values, and another tensor or module in the place of the watched one or of a module
    around it. Values are read once on entry and once on leaving. Tensors of up to 4 KB are compared
    in full, larger ones by 64 sums of their bits, each over one part. So the guard notices writes
    through `.data` or NumPy and by kernels that do not raise the version counter, such as those of
    torch's `fused=True` optimizers, without a large copy. The two readings of a 440 MB model take
    about 50 ms on a CPU. It misses only a change that leaves every sum unchanged, such as two
    values swapped within a part.

    Args:
        model: the model; also DDP-wrapped or compiled.
        content: compare all values, bit by bit, with a copy made on entry. This needs a copy of
            everything frozen. It notices every change, but not a write of equal values.

    Raises:
        RuntimeError: on leaving the block, when something changed. An exception inside the block
            passes unchanged.
        TypeError: `model` is not a module.

    Note:
        For sparse and quantized parameters and on the meta device, only the version counter is
        compared unless `content` is set.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_freeze import freeze, guard
        >>> model = nn.Linear(2, 2)
        >>> _ = freeze(model, "weight")
        >>> with guard(model), torch.no_grad():
        ...     model.weight.mul_(2)
        Traceback (most recent call last):
        ...
        RuntimeError: guard: 1 frozen tensor changed inside the block: weight (written to).
    """
    check_model(model, "guard")
    tree = Tree(model)
    watched = list(_watch(tree, content))
    modules = _by_name(tree)
    yield
    changed = _changes(watched, modules, _by_name(Tree(model)))
    if changed:
        shown = _format.listed((f"{name} ({how})" for name, how in changed.items()), 20)
        modules_too = [name in modules for name in changed]
        noun = "module" if all(modules_too) else "part" if any(modules_too) else "tensor"
        raise RuntimeError(
            f"guard: {len(changed)} frozen {noun}{'s' * (len(changed) > 1)} changed inside the "
            f"block: {shown}."
        )


@dataclass(slots=True)
class _Watched:
    name: str
    owner: nn.Module
    key: str
    tensor: torch.Tensor
    version: int | None
    address: int
    copy: torch.Tensor | None
    bits: torch.Tensor | None


def _watch(tree: Tree, content: bool) -> Iterator[_Watched]:
    read: dict[int, torch.Tensor | None] = {}
    for entry in tree.order:
        for key, parameter in entry.module._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                yield _snapshot(entry, key, parameter, content, read)
        if is_norm(entry.module) and held_by(entry.module) is not None:
            for key, buffer in entry.module._buffers.items():
                if buffer is not None:
                    one = _snapshot(entry, key, buffer, content, read)
                    # Norms may write equal values, so only the values of statistics count.
                    one.version = None
                    yield one


def _by_name(tree: Tree) -> dict[str, nn.Module]:
    return {name: entry.module for entry in tree.order for name in entry.names}


def _snapshot(
    entry: ModuleEntry,
    key: str,
    tensor: torch.Tensor,
    content: bool,
    read: dict[int, torch.Tensor | None],
) -> _Watched:
    name = f"{entry.name}.{key}" if entry.name else key
    one = _Watched(name, entry.module, key, tensor, None, _address(tensor), None, None)
    if is_lazy(tensor):
        return one
    if content:
        one.copy = _frozen_part(tensor).clone()
        return one
    if id(tensor) not in read:
        read[id(tensor)] = _bits(_frozen_part(tensor))
    one.bits = read[id(tensor)]
    # Inference tensors count no versions, and those of a table are of its live rows, too.
    if not tensor.is_inference() and not isinstance(tensor, RowFrozenParameter):
        one.version = tensor._version
    return one


def _frozen_part(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's values; of a table, the rows that are frozen."""
    return frozen_rows(tensor) if isinstance(tensor, RowFrozenParameter) else tensor.detach()


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except (RuntimeError, ValueError, NotImplementedError):
        # Sparse, lazy and some subclass tensors have no address.
        return 0


def _bits(tensor: torch.Tensor) -> torch.Tensor | None:
    """Bytes that change if the tensor's do; None if it has no plain memory to read."""
    if is_traceable_wrapper_subclass(tensor):
        names: list[str] = tensor.__tensor_flatten__()[0]
        parts = [_bits(getattr(tensor, name)) for name in names]
        found = [part for part in parts if part is not None]
        return torch.cat(found) if found and len(found) == len(parts) else None
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return None
    value = tensor.detach()
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    # In the order of memory, so that channels_last and transposed tensors are not copied.
    order = sorted(range(value.dim()), key=value.stride, reverse=True)
    flat = value.resolve_neg().permute(order).reshape(-1).contiguous().view(torch.uint8)
    if flat.numel() <= _SMALL:
        return flat.clone()
    if flat.storage_offset() % 8:
        flat = flat.clone()
    summed = flat.numel() // (8 * _SUMS) * (8 * _SUMS)
    sums = flat[:summed].view(torch.int64).view(_SUMS, -1).sum(1)
    return torch.cat([sums.view(torch.uint8), flat[summed:]])


def _changes(
    watched: list[_Watched], before: dict[str, nn.Module], after: dict[str, nn.Module]
) -> dict[str, str]:
    """What changed, by name, and how."""
    changed: dict[str, str] = {}
    unread = []
    for one in watched:
        if (swapped := _swapped(one, before, after)) is not None:
            changed[swapped] = "replaced by another module" if swapped in after else "removed"
        elif (how := _change(one)) is not None:
            changed[one.name] = how
        elif one.bits is not None:
            unread.append(one)
    for one in _unlike(unread):
        changed[one.name] = "other values"
    return changed


def _swapped(
    one: _Watched, before: dict[str, nn.Module], after: dict[str, nn.Module]
) -> str | None:
    """The outermost module around a tensor that was replaced, if any."""
    parts = one.name.split(".")
    # A key of a ParameterDict may contain dots, so names that are not modules are skipped.
    names = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next((n for n in names if n in before and after.get(n) is not before[n]), None)


def _change(one: _Watched) -> str | None:
    now = getattr(one.owner, one.key, None)
    if now is not one.tensor:
        return "removed" if now is None else "replaced by another tensor"
    if one.copy is not None:
        return None if _same_bits(one.copy, _frozen_part(now)) else "other values"
    if one.version is not None and now._version != one.version:
        return "written to"
    if one.version is not None and _address(now) != one.address:
        return "other storage"
    return None


def _unlike(watched: list[_Watched]) -> list[_Watched]:
    """Those whose bits have changed; each device is asked only once if nothing has."""
    read: dict[int, torch.Tensor | None] = {}
    by_device: dict[torch.device, list[tuple[_Watched, torch.Tensor, torch.Tensor]]] = {}
    for one in watched:
        if id(one.tensor) not in read:
            read[id(one.tensor)] = _bits(_frozen_part(one.tensor))
        now = read[id(one.tensor)]
        if one.bits is not None and now is not None:
            device = one.bits.device
            by_device.setdefault(device, []).append((one, one.bits, now.to(device)))
    unlike = []
    for several in by_device.values():
        before = torch.cat([bits for _, bits, _ in several])
        if not torch.equal(before, torch.cat([now for _, _, now in several])):
            unlike += [one for one, bits, now in several if not torch.equal(bits, now)]
    return unlike


def _same_bits(before: torch.Tensor, now: torch.Tensor) -> bool:
    if before.shape != now.shape or before.dtype != now.dtype:
        return False
    if before.layout is not torch.strided:
        return bool(torch.equal(before.to_dense(), now.to_dense()))
    # Compared as bytes, because NaN is not equal to itself, and 0.0 equals -0.0.
    a, b = (t.to(before.device).contiguous().reshape(-1).view(torch.uint8) for t in (before, now))
    return bool(torch.equal(a, b))

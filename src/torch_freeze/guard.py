"""guard: raise when something frozen changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ._hold import held_by, is_norm
from ._select import ModuleEntry, Tree, check_model, is_lazy


@contextmanager
def guard(model: nn.Module, *, content: bool = False) -> Iterator[None]:
    """Raise, naming them, if a frozen parameter or held statistic changes inside the block.

    What is frozen or held on entry is watched; of buffers those of held norms alone. By default no
    parameter is copied or read: a change shows in the tensor's version counter, which in-place
    operations of torch raise, in its address, or in another tensor standing in its place. This also
    reports a write of equal values. It cannot see writes that keep the version counter: through
    `.data` or NumPy, and by kernels that do not raise it (torch's `fused=True` optimizers are
    such). torch's batch norm is one of those, so held statistics, a few numbers per channel, are
    always compared by value.

    Args:
        model: the model, DDP-wrapped or compiled ones too.
        content: compare the values themselves, bit by bit, with a copy made on entry. Costs a
            copy of all that is frozen; sees every change, and no write of equal values.

    Raises:
        RuntimeError: on leaving the block, when something changed. An exception inside the block
            passes unchanged.
        TypeError: `model` is not a module.

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
    watched = list(_watch(Tree(model), content))
    yield
    changed = [f"{one.name} ({how})" for one in watched if (how := _change(one)) is not None]
    if changed:
        shown = ", ".join(changed[:20])
        if len(changed) > 20:
            shown += f" and {len(changed) - 20} more"
        noun = "tensor" if len(changed) == 1 else "tensors"
        raise RuntimeError(
            f"guard: {len(changed)} frozen {noun} changed inside the block: {shown}."
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


def _watch(tree: Tree, content: bool) -> Iterator[_Watched]:
    for entry in tree.order:
        for key, parameter in entry.module._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                yield _snapshot(_join(entry, key), entry.module, key, parameter, content)
        if is_norm(entry.module) and held_by(entry.module) is not None:
            for key, buffer in entry.module._buffers.items():
                if buffer is not None:
                    yield _snapshot(_join(entry, key), entry.module, key, buffer, True)


def _join(entry: ModuleEntry, key: str) -> str:
    return f"{entry.name}.{key}" if entry.name else key


def _snapshot(
    name: str, owner: nn.Module, key: str, tensor: torch.Tensor, content: bool
) -> _Watched:
    lazy = is_lazy(tensor)
    # Inference tensors count no versions, so only their values can tell.
    uncounted = not lazy and tensor.is_inference()
    copy = None
    if (content or uncounted) and not lazy:
        copy = tensor.detach().clone()
    version = None if content or uncounted else tensor._version
    return _Watched(name, owner, key, tensor, version, _address(tensor), copy)


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except (RuntimeError, ValueError, NotImplementedError):
        # Sparse, lazy and some subclass tensors have no address.
        return 0


def _change(one: _Watched) -> str | None:
    now = getattr(one.owner, one.key, None)
    if now is not one.tensor:
        return "removed" if now is None else "replaced by another tensor"
    if one.copy is not None:
        return None if _same_bits(one.copy, now.detach()) else "other values"
    if one.version is not None and now._version != one.version:
        return "written to"
    if one.version is not None and _address(now) != one.address:
        return "other storage"
    return None


def _same_bits(before: torch.Tensor, now: torch.Tensor) -> bool:
    if before.shape != now.shape or before.dtype != now.dtype:
        return False
    if before.layout is not torch.strided:
        return bool(torch.equal(before.to_dense(), now.to_dense()))
    # As bytes: NaN differs from itself as a number, and 0.0 equals -0.0.
    a, b = (t.to(before.device).contiguous().reshape(-1).view(torch.uint8) for t in (before, now))
    return bool(torch.equal(a, b))

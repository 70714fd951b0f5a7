"""A tensor that has everything but its data, for what a cached forward pass does not compute."""

from __future__ import annotations

import types
from collections.abc import Hashable
from operator import attrgetter
from typing import Any

import torch
from torch.utils._pytree import tree_iter, tree_map

_aten = torch.ops.aten
# Operations that read the shape, dtype and device of their first argument, and no element.
_BY_SHAPE = {
    _aten.zeros_like,
    _aten.ones_like,
    _aten.full_like,
    _aten.empty_like,
    _aten.new_zeros,
    _aten.new_ones,
    _aten.new_full,
    _aten.new_empty,
    _aten.new_empty_strided,
}

# Of these kinds and modules are the functions of torch, whose results may be given again.
_BUILT_IN = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
)
_MODULES = {"torch.nn.functional", "torch.functional", "torch._tensor"}
_PLAIN = {
    *(bool, int, float, complex, str, type(None), type(...)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
}
_DEVICES = ("cpu", "cuda")
_MOST = 4096  # results


class StandInError(RuntimeError):
    """The data of a StandIn was needed."""


class StandIn(torch.Tensor):
    """A tensor with shape, strides, dtype and device, and without data.

    Operations give stand-ins of the right shape. Whatever would need a number raises StandInError:
    reading an element, writing into an ordinary tensor, or an operation that backward goes through.
    So a result is never computed from data that is not there.

    A stand-in that an operation gave is given again when the operation has the same arguments: as
    every batch of a size has the same, nothing is worked out twice.
    """

    meta: torch.Tensor
    # Without a detour through `__torch_function__`, because models ask often.
    shape = property(attrgetter("_shape"))
    dtype = property(attrgetter("_dtype"))
    device = property(attrgetter("_device"))

    @staticmethod
    def __new__(cls, meta: torch.Tensor, device: torch.device) -> StandIn:
        # Whatever the mode, because it is used in other passes as well.
        with torch.inference_mode(False):
            made: StandIn = torch.Tensor._make_wrapper_subclass(
                cls,
                meta.shape,
                strides=meta.stride(),
                storage_offset=meta.storage_offset(),
                dtype=meta.dtype,
                device=device,
            )
        made.meta = meta
        made.__dict__.update(_shape=meta.shape, _dtype=meta.dtype, _device=device)
        return made

    @classmethod
    def make(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> StandIn:
        """A contiguous one of this shape."""
        with torch.inference_mode(False):
            return cls(torch.empty(shape, dtype=dtype, device="meta"), device)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StandIn(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        try:
            key = _key(func, args, kwargs)
        except TypeError:  # takes what is not known here
            key = None
        if key is not None and (found := _known.get(key)) is not None:
            return found[0]
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        if key is not None and _made_of_stand_ins(out):
            if len(_known) >= _MOST:
                _known.clear()
            # With the stand-ins whose addresses are in the key, so that no others get them.
            _known[key] = out, [t for t in tree_iter((args, kwargs)) if type(t) is StandIn]
        return out

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket in _BY_SHAPE and isinstance(args[0], StandIn):
            like = args[0]
            empty = torch.empty_strided(
                like.shape, like.stride(), dtype=like.dtype, device=like.device
            )
            return func(empty, *args[1:], **kwargs)
        device: torch.device | None = None
        known: dict[int, StandIn] = {}

        def to_meta(value: Any) -> Any:
            nonlocal device
            if isinstance(value, StandIn):
                device = value.device
                known[id(value.meta)] = value
                return value.meta
            if not isinstance(value, torch.Tensor):
                return value
            if value.requires_grad:
                raise StandInError(f"{func} needs the data of a tensor that was not computed")
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="meta"
            )

        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, torch.Tensor) and not isinstance(value, StandIn):
                raise StandInError(f"{func} would write a tensor that was not computed")
        meta_args, meta_kwargs = tree_map(to_meta, (args, kwargs))
        if meta_kwargs.get("device") is not None:
            device = torch.device(meta_kwargs["device"])
            meta_kwargs["device"] = torch.device("meta")
        try:
            with torch.inference_mode(False):
                out = func(*meta_args, **meta_kwargs)
        except (NotImplementedError, RuntimeError) as error:
            raise StandInError(f"{func} on a tensor that was not computed: {error}") from error

        def from_meta(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if (same := known.get(id(value))) is not None:
                if same.shape != value.shape:
                    raise StandInError(f"{func} would change a tensor that was not computed")
                return same
            assert device is not None
            return StandIn(value, device)

        return tree_map(from_meta, out)


_known: dict[Hashable, tuple[Any, list[StandIn]]] = {}


def _made_of_stand_ins(out: Any) -> bool:
    if type(out) is tuple:
        return all(map(_made_of_stand_ins, out))
    return type(out) is StandIn


def _key(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """All that the result of a call of torch can depend on; None if that cannot be told."""
    if not isinstance(func, _BUILT_IN) and getattr(func, "__module__", "") not in _MODULES:
        return None
    casts: list[Any] = []
    if torch._C._is_any_autocast_enabled():
        casts = [torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in _DEVICES]
    default = torch.get_default_dtype()
    return (func, default, *casts, *map(_part, args), *kwargs, *map(_part, kwargs.values()))


def _part(value: Any) -> Hashable:
    kind = type(value)
    if kind is StandIn:
        return StandIn, id(value)
    if kind in _PLAIN:
        return kind, value  # with its type, as 1 equals True and 1.0
    if kind in (tuple, list, torch.Size):
        return (kind, *map(_part, value))
    if kind is slice:
        return slice, _part(value.start), _part(value.stop), _part(value.step)
    if isinstance(value, torch.Tensor):
        layout = value.shape, value.stride(), value.dtype, value.device
        return kind, *layout, value.requires_grad
    raise TypeError

"""A tensor that has everything but its data, for what a cached forward pass does not compute."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

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


class StandInError(RuntimeError):
    """The data of a StandIn was needed."""


class StandIn(torch.Tensor):
    """A tensor with shape, strides, dtype and device, and without data.

    Operations give stand-ins of the right shape. Whatever would need a number raises StandInError:
    reading an element, writing into an ordinary tensor, or an operation that backward goes through.
    So a result is never computed from data that is not there.
    """

    meta: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, meta: torch.Tensor, device: torch.device) -> StandIn:
        made: StandIn = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=device,
        )
        made.meta = meta
        return made

    @classmethod
    def make(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> StandIn:
        """A contiguous one of this shape."""
        return cls(torch.empty(shape, dtype=dtype, device="meta"), device)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StandIn(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

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

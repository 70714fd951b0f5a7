"""A frozen table of which some rows train, and what torch's functions do with it.

The values of the live rows are those of the live parameter. The table's own memory has a copy of
them, brought up to date whenever a torch function reads the table, so the table always looks whole:
to state_dict, to a tied layer, to a user who prints it. The reverse holds, too: what is written
into live rows of the table's memory (`table.data[-1] = x`, an average of state_dicts) raises the
table's version, and the live parameter gets it at its next use, unless it has changed since itself.
So a loop that changes all parameters, such as a moving average, counts once for the live rows.

Functions with a cheap gradient of the live rows have one here: `F.embedding`, `F.embedding_bag`
and `F.linear`. Any other differentiable function (`x @ weight.T`) gets the table with the live rows
attached to autograd; that is right, too, but its backward makes a gradient of the whole table.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_iter, tree_map

if TYPE_CHECKING:
    from ._live import LiveRows

# Properties that read values; all others describe the tensor or its autograd state.
_READING = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
# Methods that describe the tensor or concern the object itself, and read no values. So do all that
# begin with "is_", "_is_" or "_make_".
_DESCRIBING = frozenset(
    {
        "__len__",
        "size",
        "stride",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "element_size",
        "storage_offset",
        "untyped_storage",
        "data_ptr",
        "get_device",
        "register_hook",
        "register_post_accumulate_grad_hook",
        "requires_grad_",
        "retain_grad",
        "_has_compatible_shallow_copy_type",
        "_typed_storage",
    }
)


class RowFrozenParameter(nn.Parameter):
    """A frozen parameter of shape (rows, ...) of which some rows train as a parameter of their own.

    `freeze(model, name, rows=...)` gives a table this class and `unfreeze` takes it away again; the
    object stays the same one. Its `requires_grad` is False. A pickle of it is a plain parameter.
    """

    # Set by `bind`.
    _rows: LiveRows
    _key: str
    #: Which live parameter was in the table's memory last, and the versions of both then.
    _seen: tuple[int, int, int]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            own = _FUNCTIONS.get(func)
            if own is not None and (torch.compiler.is_dynamo_compiling() or not _transformed()):
                return own(*args, **kwargs)
            return _call(func, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> RowFrozenParameter:
        import copy

        if id(self) not in memo:
            with torch._C.DisableTorchFunctionSubclass():
                _sync(self, trains=True)
                memo[id(self)] = twin = nn.Parameter(self.data.clone(), False)
            bind(twin, copy.deepcopy(self._rows, memo), self._key)
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        with torch._C.DisableTorchFunctionSubclass():
            _sync(self)
            # Attributes and the class stay here: what is pickled loads without torch_freeze.
            return torch._utils._rebuild_parameter, (self.data, False, {})


def bind(parameter: nn.Parameter, rows: LiveRows, key: str) -> None:
    """Make a plain parameter the table of `rows`, whose parameter `key` has its live rows."""
    parameter.requires_grad_(False)
    parameter.__class__ = RowFrozenParameter
    vars(parameter).update(_rows=rows, _key=key)
    with torch._C.DisableTorchFunctionSubclass():
        _see(parameter)  # type: ignore[arg-type]


def unbind(table: RowFrozenParameter) -> None:
    """Make a table a plain frozen parameter again, with the live rows' values."""
    with torch._C.DisableTorchFunctionSubclass():
        _sync(table)
    del vars(table)["_rows"], vars(table)["_key"], vars(table)["_seen"]
    table.__class__ = nn.Parameter  # type: ignore[assignment]


def live_of(table: RowFrozenParameter) -> nn.Parameter:
    """The parameter of the live rows."""
    return getattr(table._rows, table._key)  # type: ignore[no-any-return]


def frozen_rows(table: RowFrozenParameter) -> Tensor:
    """The values of the rows that are frozen: the table's memory if they are one run, or a copy."""
    rows = table._rows
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        values = table.detach()
        if rows.start == 0:
            return values[len(rows.index) :]
        if rows.last + 1 == len(values) and rows.start is not None:
            return values[: rows.start]
        mask = torch.ones(len(values), dtype=torch.bool, device=values.device)
        mask[rows.index.to(values.device)] = False
        return values[mask]


def take_over(table: RowFrozenParameter) -> None:
    """Give the live rows the values that the table has for them."""
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        live = live_of(table)
        live.copy_(table.index_select(0, table._rows.index.to(table.device)))
        _see(table)


def _version(tensor: Tensor) -> int:
    # Inference tensors count no versions.
    return 0 if tensor.is_inference() else tensor._version


def _see(table: RowFrozenParameter) -> None:
    """Remember that the table's memory and the live rows have the same values now."""
    live = live_of(table)
    table._seen = (id(live), _version(live), _version(table))


def _equal(table: RowFrozenParameter) -> bool:
    """Whether the table's memory and the live rows have the same values; so they do without any."""
    live = live_of(table).detach()
    if table.is_meta or live.is_meta:
        return True
    held = table.detach().index_select(0, table._rows.index.to(table.device))
    return torch.equal(held, live.to(held.device, held.dtype))


def _written(table: RowFrozenParameter) -> bool:
    """Whether something was written into the table's memory, and not into the live rows, since."""
    live = live_of(table)
    same, version = table._seen[:2], table._seen[2]
    return _version(table) != version and (id(live), _version(live)) == same


def _sync(table: RowFrozenParameter, *, trains: bool = False) -> None:
    """Write the values of the live rows into the table.

    Where the table was written to instead, its memory is what counts. If `trains`, because the live
    rows are about to be used themselves, they get those values.
    """
    live = live_of(table)
    if live.is_meta or table.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(live):
        return
    if torch._C._get_tracing_state() is not None:
        return  # A trace takes the live rows themselves.
    if _transformed():
        # Those would take it for a part of what they differentiate.
        with torch._C._DisableFuncTorch(), torch.autograd.forward_ad._set_fwd_grad_enabled(False):
            _write(table, trains=trains)
    else:
        _write(table, trains=trains)


def _write(table: RowFrozenParameter, *, trains: bool) -> None:
    rows, live = table._rows, live_of(table)
    if _written(table):
        if trains:
            take_over(table)
        return
    if rows.resized:
        rows.resized = False
        if not live.requires_grad:
            warnings.warn(
                f"The table of {len(table):,} rows was resized, and its {len(live):,} live rows "
                "are frozen since, probably by requires_grad_(False) on the layer, as "
                "resize_token_embeddings does it. If they should train, call "
                "torch_freeze.unfreeze(model, layer, rows=...) with the same rows.",
                UserWarning,
                stacklevel=5,
            )
    with torch.no_grad():
        # Through `data`, because the versions of the table count other writes. A live row that
        # changes between forward and backward raises its own version.
        whole, now = table.data, live.detach()
        # While a model is moved or cast, the two differ for a moment.
        now = now.to(whole.device, whole.dtype)
        if rows.start is not None:
            whole[rows.start : rows.start + len(now)].copy_(now)
        else:
            whole.index_copy_(0, rows.index.to(whole.device), now)
    _see(table)


def use(table: RowFrozenParameter) -> None:
    """Give the live rows, before they are used, what was written into the table for them."""
    with torch._C.DisableTorchFunctionSubclass():
        _sync(table, trains=True)


def _call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any function that has no rule of its own."""
    name = func.__name__
    if name in ("__get__", "__set__", "__delete__"):
        field = getattr(getattr(func, "__self__", None), "__name__", "")
        if name == "__set__" and field == "data":
            return _set_data(args[0], args[1])
        if name == "__set__" and field == "requires_grad" and args[1]:
            raise _whole_trains(args[0])
        if name == "__get__" and field == "data":
            # Unlike `data`, it has the table's version, so that writes to it are noticed.
            _sync(args[0])
            return args[0].detach()
        describes = name != "__get__" or field not in _READING
    else:
        if name == "requires_grad_" and (args[1:] or (kwargs.get("requires_grad", True),))[0]:
            raise _whole_trains(args[0])
        describes = name in _DESCRIBING or name.startswith("is_")
        describes |= name.startswith(("_is_", "_make_"))
    if describes:
        return func(*args, **kwargs)
    if name == "copy_" and len(args) > 1 and _of_itself(*args[:2]):
        # A checkpoint was read into the values of the model's own state_dict, perhaps after a step
        # of the optimizer (torch.distributed.checkpoint does both), and is loaded from there.
        take_over(args[0])
        return args[0]
    if name == "module_load":
        return _loaded(args[0], func(*args, **kwargs))
    compiling = torch.compiler.is_dynamo_compiling()
    found = list(_tables((args, kwargs)))
    writes = name.endswith("_") and not name.endswith("__")
    writes |= name == "__setitem__" or name.startswith("__i") or "out" in kwargs
    # In a transform, live rows may be traced though they do not say so.
    transformed = not compiling and _transformed()
    trains = torch.is_grad_enabled() and any(live_of(t).requires_grad for t in found)
    if not compiling:
        for table in found:
            _sync(table, trains=trains and not writes and name != "detach")
    if writes or name == "detach" or not (trains or compiling or transformed):
        result = func(*args, **kwargs)
        for table in found if writes and not (compiling or transformed) else ():
            # A tied table is loaded once for each of its names; only the first brings other values.
            if _equal(table):
                _see(table)
        return result
    args, kwargs = tree_map(
        lambda one: whole(one) if isinstance(one, RowFrozenParameter) else one, (args, kwargs)
    )
    return func(*args, **kwargs)


def _of_itself(table: Any, source: Any) -> bool:
    """Whether a table was written to, and now gets what is in its memory."""
    return (
        isinstance(table, RowFrozenParameter)
        and isinstance(source, Tensor)
        and not isinstance(source, RowFrozenParameter)
        and not (table.is_meta or source.is_meta)
        and source.device == table.device
        and source.data_ptr() == table.data_ptr()
        and source.shape == table.shape
        and source.stride() == table.stride()
        and _version(table) != table._seen[2]
    )


def _loaded(table: RowFrozenParameter, values: Tensor) -> nn.Parameter:
    """What load_state_dict swaps a table with, where torch.__future__ has it do so."""
    new = nn.Parameter(values.detach(), False)
    bind(new, table._rows, table._key)
    assert isinstance(new, RowFrozenParameter)
    take_over(new)
    return new


def _whole_trains(table: RowFrozenParameter) -> RuntimeError:
    return RuntimeError(
        f"requires_grad cannot become True for the table of shape {list(table.shape)}, because "
        "only some of its rows train. To train all, call torch_freeze.unfreeze(model, layer); to "
        "train these rows, set it for the layer's live_rows."
    )


def _tables(given: Any) -> Iterator[RowFrozenParameter]:
    for one in tree_iter(given):
        if isinstance(one, RowFrozenParameter):
            yield one


def _set_data(table: RowFrozenParameter, value: Tensor) -> None:
    """`table.data = value`: the live rows must be in it, and get the values there."""
    rows = table._rows
    if not value.dim() or len(value) <= rows.last or value.shape[1:] != table.shape[1:]:
        raise ValueError(
            f"the table of shape {list(table.shape)} has live rows up to row {rows.last} and "
            f"cannot become one of shape {list(value.shape)}; call torch_freeze.unfreeze on it "
            "first."
        )
    if len(value) != len(table):
        rows.frozen = len(value) - len(rows.index)
        rows.resized = live_of(table).requires_grad
    table.data = value
    if not _equal(table):
        # They are not those of a model that is moved or cast. A version is never negative.
        table._seen = (id(live_of(table)), _version(live_of(table)), -1)


def _transformed() -> bool:
    """Whether torch.func, forward-mode AD or torch.jit.trace looks at what is computed."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def whole(table: RowFrozenParameter) -> Tensor:
    """The table as a tensor whose gradient goes to the live rows; shares the table's memory."""
    live, index = live_of(table), table._rows.index
    if torch.compiler.is_dynamo_compiling() or _transformed():
        return table.index_copy(0, index, live.to(table.dtype))
    return _Whole.apply(table, live, index)  # type: ignore[no-any-return]


class _Whole(torch.autograd.Function):
    """The table itself; backward takes the live rows out of a gradient of the whole table."""

    generate_vmap_rule = True

    @staticmethod
    def forward(table: Tensor, live: Tensor, index: Tensor) -> Tensor:
        return table.data

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        # The live rows are saved for their version: what was made of the table has its memory.
        ctx.save_for_backward(inputs[1], inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _, index = ctx.saved_tensors
        return None, grad.index_select(0, index), None


# --- lookups -----------------------------------------------------------------------------------


def _places(ids: Tensor, index: Tensor, start: int | None, padding: int | None) -> Tensor:
    """For each id its place among the live rows, or their number if that row is frozen."""
    k = index.shape[0]
    if start is not None:
        # Without its sign, a row before the first is as large as those after the last.
        places = (ids - start).bitwise_and(torch.iinfo(ids.dtype).max).clamp(max=k)
    else:
        index = index.to(ids.dtype)
        at = torch.searchsorted(index, ids).clamp(max=k - 1)
        places = torch.where(index[at] == ids, at, k)
    return places if padding is None else torch.where(ids == padding, k, places)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if not isinstance(weight, RowFrozenParameter) or max_norm is not None:
        return _call(  # type: ignore[no-any-return]
            F.embedding,
            (input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse),
            {},
        )
    rows, live = weight._rows, live_of(weight)
    patch = torch.compiler.is_dynamo_compiling()
    if not patch:
        trains = torch.is_grad_enabled() and live.requires_grad
        _sync(weight, trains=trains)
        if not trains:
            return F.embedding(input, weight)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return _Lookup.apply(  # type: ignore[no-any-return]
        input, weight, live, rows.index, rows.start, padding_idx, scale_grad_by_freq, patch
    )


class _Lookup(torch.autograd.Function):
    """`F.embedding`; its gradient is torch's own, of a table that has the live rows alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        ids: Tensor,
        table: Tensor,
        live: Tensor,
        index: Tensor,
        start: int | None,
        padding: int | None,
        by_frequency: bool,
        patch: bool,
    ) -> Tensor:
        out = F.embedding(ids, table)
        if patch:
            # A compiled graph does not write into the table; it selects.
            at = _places(ids, index, start, None)
            k = live.shape[0]
            new = F.embedding(at.clamp(max=k - 1), live.to(out.dtype))
            out = torch.where((at < k).unsqueeze(-1), new, out)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ids, _, _, index, start, padding, by_frequency, _ = inputs
        ctx.save_for_backward(ids, index)
        ctx.start, ctx.padding, ctx.by_frequency = start, padding, by_frequency

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ids, index = ctx.saved_tensors
        k = index.shape[0]
        places = _places(ids, index, ctx.start, ctx.padding)
        # One row more, where torch puts nothing: its own kernels leave out the padding's.
        dense = torch.ops.aten.embedding_dense_backward(grad, places, k + 1, k, ctx.by_frequency)
        return None, None, dense[:k], None, None, None, None, None


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    options = (scale_grad_by_freq, mode, include_last_offset, padding_idx)
    trains = (
        isinstance(weight, RowFrozenParameter)
        and max_norm is None
        and torch.is_grad_enabled()
        and live_of(weight).requires_grad
    )
    if not trains or torch.compiler.is_dynamo_compiling():
        return _call(  # type: ignore[no-any-return]
            F.embedding_bag,
            (input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, False),
            {
                "per_sample_weights": per_sample_weights,
                "include_last_offset": include_last_offset,
                "padding_idx": padding_idx,
            },
        )
    assert isinstance(weight, RowFrozenParameter)
    _sync(weight, trains=True)
    rows = weight._rows
    return _Bag.apply(  # type: ignore[no-any-return]
        input, weight, live_of(weight), rows.index, rows.start, offsets, per_sample_weights, options
    )


def _bag(
    ids: Tensor, table: Tensor, offsets: Tensor | None, weights: Tensor | None, options: Any
) -> Tensor:
    by_frequency, mode, last, padding = options
    return F.embedding_bag(
        ids,
        table,
        offsets,
        scale_grad_by_freq=by_frequency,
        mode=mode,
        per_sample_weights=weights,
        include_last_offset=last,
        padding_idx=padding,
    )


class _Bag(torch.autograd.Function):
    """`F.embedding_bag`; backward repeats it on a table of the rows that the batch looks up."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        table: Tensor,
        live: Tensor,
        index: Tensor,
        start: int | None,
        offsets: Tensor | None,
        weights: Tensor | None,
        options: Any,
    ) -> Tensor:
        ctx.save_for_backward(ids, table, live, index, offsets, weights)
        ctx.start, ctx.options = start, options
        return _bag(ids, table, offsets, weights, options)

    @staticmethod
    @once_differentiable  # type: ignore[misc,unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> Any:
        ids, table, live, index, offsets, weights = ctx.saved_tensors
        by_frequency, mode, last, padding = ctx.options
        used, inverse = torch.unique(ids, return_inverse=True)
        if padding is not None:
            at = torch.searchsorted(used, padding % table.shape[0])
            there = int(at) < len(used) and int(used[at]) == padding % table.shape[0]
            padding = int(at) if there else None
        few = table[used].detach().requires_grad_()
        if weights is not None:
            weights = weights.detach().requires_grad_()
        with torch.enable_grad():
            options = (by_frequency, mode, last, padding)
            out = _bag(inverse.to(ids.dtype), few, offsets, weights, options)
        wanted = [few] if weights is None else [few, weights]
        of_few, *of_weights = torch.autograd.grad(out, wanted, grad)
        places = _places(used, index, ctx.start, None)
        hit = places < live.shape[0]
        of_live = torch.zeros_like(live)
        of_live[places[hit]] = of_few[hit].to(live.dtype)
        of_weight = of_weights[0] if of_weights else None
        return None, None, of_live, None, None, None, of_weight, None


# --- projections -------------------------------------------------------------------------------


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    compiling = torch.compiler.is_dynamo_compiling()
    if not compiling:
        for table in _tables((weight, bias)):
            _sync(table, trains=torch.is_grad_enabled() and live_of(table).requires_grad)
    if isinstance(bias, RowFrozenParameter) and not (
        isinstance(weight, RowFrozenParameter) and bias._rows is weight._rows
    ):
        # A bias whose weight is not frozen by rows, or in another layer that it is tied to.
        bias = whole(bias)
    if not isinstance(weight, RowFrozenParameter):
        return F.linear(input, weight, bias)
    rows, live = weight._rows, live_of(weight)
    live_bias: Tensor | None = live_of(bias) if isinstance(bias, RowFrozenParameter) else None
    trains = live.requires_grad or (live_bias is not None and live_bias.requires_grad)
    if not compiling and not (torch.is_grad_enabled() and trains):
        return F.linear(input, weight, bias)
    if compiling or torch._C._len_torch_dispatch_stack():
        # From torch's own operations, for compilers and for those who watch operations.
        out = F.linear(input, weight, bias)
        if live_bias is None and bias is not None:
            live_bias = bias.index_select(0, rows.index)
        return out.index_copy(-1, rows.index, F.linear(input, live, live_bias).to(out.dtype))
    given = (input, weight, bias, live, live_bias)
    kind = input.device.type
    if torch.is_autocast_enabled(kind) and input.dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        given = tuple(None if t is None else t.to(dtype) for t in given)  # type: ignore[assignment]
    return _Projection.apply(*given, rows.index, rows.start)  # type: ignore[no-any-return]


class _Projection(torch.autograd.Function):
    """`F.linear`, of whose outputs the live rows are some columns."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        table: Tensor,
        bias: Tensor | None,
        live: Tensor,
        live_bias: Tensor | None,
        index: Tensor,
        start: int | None,
    ) -> Tensor:
        return F.linear(x, table, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, table, _, live, _, index, start = inputs
        # The live rows are saved for their version: backward needs the table as it is now.
        ctx.save_for_backward(x, table, live, index)
        ctx.start = start

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, table, live, index = ctx.saved_tensors
        of_x, _, of_bias, of_live, of_live_bias, _, _ = ctx.needs_input_grad
        if ctx.start is not None:
            own = grad.narrow(-1, ctx.start, len(index))
        else:
            own = grad.index_select(-1, index)
        own = own.reshape(-1, len(index))
        if of_x and torch.is_grad_enabled():
            # This backward is recorded itself, and the live rows are part of what it computes.
            table = table.index_copy(0, index, live)
        return (
            grad @ table if of_x else None,
            None,
            grad.reshape(-1, grad.shape[-1]).sum(0) if of_bias else None,
            own.mT @ x.reshape(-1, x.shape[-1]) if of_live else None,
            own.sum(0) if of_live_bias else None,
            None,
            None,
        )


_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    F.linear: _linear,
}

"""torch.distributed.checkpoint: resume an optimizer whose frozen set has changed since."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.storage import StorageReader

from torch_freeze._tree import Tree, check_model


@contextmanager
def frozen_as_saved(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    checkpoint_id: str | os.PathLike[str] | None = None,
    *,
    key: str = "optimizer",
    storage_reader: StorageReader | None = None,
) -> Iterator[tuple[str, ...]]:
    """Load the optimizer's state from a distributed checkpoint although the frozen set has changed.

    torch.distributed.checkpoint loads into existing tensors and assumes that exactly the trainable
    parameters have state, such as momentum or the moments of AdamW. Loading therefore raises
    "Missing key" for parameters that were frozen when the checkpoint was saved, and silently leaves
    out the state of those frozen since. Inside this block the optimizer has exactly the state that
    the checkpoint has, and exactly those parameters are trainable. On leaving it, also after an
    exception, `requires_grad` is what it was before.

    Args:
        model: the model, sharded by `fully_shard` or not, wrapped or not.
        optimizer: an optimizer of torch_freeze or torch over its parameters. Its present state is
            discarded.
        checkpoint_id: path of the checkpoint, as for `torch.distributed.checkpoint.load`.
        key: key of the optimizer's state in the checkpoint.
        storage_reader: reader of the checkpoint, if it is not a FileSystemReader.

    Yields:
        Names of the parameters that have state in the checkpoint.

    Raises:
        ValueError: the checkpoint has nothing under `key`, a parameter's state in it contains
            containers, or neither a path nor a reader is given.
        TypeError: `model` is not a module.

    Example:
        >>> import tempfile
        >>> import torch.distributed.checkpoint as dcp
        >>> from torch import nn
        >>> from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
        >>> from torch_freeze import FrozenAwareAdamW, freeze
        >>> from torch_freeze.integrations.checkpoint import frozen_as_saved
        >>> def build():
        ...     model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        ...     return model, FrozenAwareAdamW(model.parameters(), lr=1e-3)
        >>> def state(model, optimizer):
        ...     return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
        >>> model, optimizer = build()
        >>> _ = freeze(model, "0")
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> path = tempfile.mkdtemp()
        >>> _ = dcp.save(state(model, optimizer), checkpoint_id=path, no_dist=True)

        >>> model, optimizer = build()
        >>> _ = freeze(model, "1")  # another frozen set
        >>> with frozen_as_saved(model, optimizer, path):
        ...     saved = state(model, optimizer)
        ...     dcp.load(saved, checkpoint_id=path, no_dist=True)
        ...     _ = set_state_dict(
        ...         model, optimizer, model_state_dict=saved["model"],
        ...         optim_state_dict=saved["optimizer"],
        ...     )
        >>> model[0].weight in optimizer.state, model[1].weight in optimizer.state
        (False, True)
        >>> model[0].weight.requires_grad, model[1].weight.requires_grad
        (True, False)
    """
    check_model(model, "frozen_as_saved")
    if storage_reader is None:
        if checkpoint_id is None:
            raise ValueError("frozen_as_saved: give checkpoint_id or storage_reader.")
        storage_reader = FileSystemReader(checkpoint_id)
    saved = storage_reader.read_metadata().state_dict_metadata
    if not any(name.startswith(f"{key}.") for name in saved):
        found = ", ".join(sorted({repr(name.split(".")[0]) for name in saved})) or "none"
        raise ValueError(
            f"frozen_as_saved: the checkpoint holds nothing under {key=}; its keys are: {found}."
        )
    entries = list(Tree(model).params.values())
    states = _states_in(saved, [[f"{key}.state.{n}" for n in entry.names] for entry in entries])
    before = [(entry.parameter, entry.parameter.requires_grad) for entry in entries]
    try:
        for entry, state in zip(entries, states, strict=True):
            parameter = entry.parameter
            optimizer.state.pop(parameter, None)
            parameter.requires_grad = bool(state)
            if state:
                made = {name: _to_load(name, saved[at], parameter) for name, at in state.items()}
                optimizer.state[parameter] = made
        yield tuple(entry.name for entry, state in zip(entries, states, strict=True) if state)
    finally:
        for parameter, required in before:
            parameter.requires_grad = required


def _states_in(saved: Mapping[str, Any], places: list[list[str]]) -> list[dict[str, str]]:
    """For each parameter, given the names its state may have, its state's keys and their places."""
    owner = {name: index for index, names in enumerate(places) for name in names}
    found: list[dict[str, str]] = [{} for _ in places]
    for at in saved:
        name, _, state_key = at.rpartition(".")
        if name in owner:
            found[owner[name]][state_key] = at
            continue
        while name := name.rpartition(".")[0]:
            if name in owner:
                raise ValueError(
                    f"frozen_as_saved: {at!r} is inside a container, and only an optimizer whose "
                    "state of a parameter is flat can be loaded; load this checkpoint while the "
                    "parameters are frozen that were frozen when it was saved."
                )
    return found


def _to_load(name: str, saved: Any, parameter: torch.Tensor) -> Any:
    """What a value of a parameter's state is loaded into."""
    if not isinstance(saved, TensorStorageMetadata):
        return None  # replaced as a whole
    dtype = saved.properties.dtype
    # torch keeps the count of updates on the CPU, and moves it itself if it belongs elsewhere.
    if name != "step" and saved.size == parameter.shape:
        return torch.zeros_like(parameter.detach(), dtype=dtype)
    return torch.zeros(saved.size, dtype=dtype)

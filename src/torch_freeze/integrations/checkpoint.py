"""torch.distributed.checkpoint: resume an optimizer whose frozen set has changed since."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
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
    """Load the momentum of a distributed checkpoint although the frozen set has changed.

    torch.distributed.checkpoint loads into existing tensors and assumes that exactly the trainable
    parameters have momentum. Loading therefore raises "Missing key" for parameters that were frozen
    when the checkpoint was saved, and silently leaves out the momentum of those frozen since.
    Inside this block the optimizer has exactly the buffers that the checkpoint has, and exactly
    those parameters are trainable. On leaving it, also after an exception, `requires_grad` is what
    it was before.

    Args:
        model: the model, sharded by `fully_shard` or not, wrapped or not.
        optimizer: an SGD over its parameters (FrozenAwareSGD or torch.optim.SGD). Its present
            momentum is discarded.
        checkpoint_id: path of the checkpoint, as for `torch.distributed.checkpoint.load`.
        key: key of the optimizer's state in the checkpoint.
        storage_reader: reader of the checkpoint, if it is not a FileSystemReader.

    Yields:
        Names of the parameters that have a momentum buffer in the checkpoint.

    Raises:
        ValueError: the checkpoint has nothing under `key`, or neither a path nor a reader is
            given.
        TypeError: `model` is not a module.

    Example:
        >>> import tempfile
        >>> import torch.distributed.checkpoint as dcp
        >>> from torch import nn
        >>> from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
        >>> from torch_freeze import FrozenAwareSGD, freeze
        >>> from torch_freeze.integrations.checkpoint import frozen_as_saved
        >>> def build():
        ...     model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        ...     return model, FrozenAwareSGD(model.parameters(), lr=0.1, momentum=0.9)
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
    named = []
    entries = Tree(model).params.values()
    before = [(entry.parameter, entry.parameter.requires_grad) for entry in entries]
    try:
        for entry in entries:
            parameter = entry.parameter
            optimizer.state.pop(parameter, None)
            has_momentum = any(f"{key}.state.{n}.momentum_buffer" in saved for n in entry.names)
            parameter.requires_grad = has_momentum
            if has_momentum:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.detach())
                named.append(entry.name)
        yield tuple(named)
    finally:
        for parameter, required in before:
            parameter.requires_grad = required

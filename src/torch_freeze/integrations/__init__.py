"""Freezing where others own the training loop; each module needs its package only when imported.

- `torch_freeze.integrations.lightning`: FreezeCallback for a Lightning Trainer
- `torch_freeze.integrations.transformers`: FreezeTrainerCallback for a Transformers Trainer
- `torch_freeze.integrations.checkpoint`: torch.distributed.checkpoint, whatever was frozen then

Accelerate needs nothing: `prepare` the optimizer as ever, and let `register_for_checkpointing`
have the FreezeSchedule.
"""

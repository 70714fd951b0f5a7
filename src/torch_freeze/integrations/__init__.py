"""Freezing under frameworks that own the training loop; import the module for yours.

- `torch_freeze.integrations.lightning`: FreezeCallback for a Lightning Trainer
- `torch_freeze.integrations.transformers`: FreezeTrainerCallback for a Transformers Trainer
- `torch_freeze.integrations.checkpoint`: torch.distributed.checkpoint across frozen sets

Accelerate needs no module: `prepare` the optimizer as usual, and pass the FreezeSchedule to
`register_for_checkpointing`.
"""

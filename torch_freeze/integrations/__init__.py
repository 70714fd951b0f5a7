"""Freezing where others own the training loop; each module needs its package only when imported.

- `torch_freeze.integrations.lightning`: FreezeCallback for a Lightning Trainer
- `torch_freeze.integrations.transformers`: FreezeTrainerCallback for a Transformers Trainer
- `torch_freeze.integrations.accelerate`: checkpoints of a FreezeSchedule with Accelerate
- `torch_freeze.integrations.checkpoint`: torch.distributed.checkpoint across a changed frozen set
"""

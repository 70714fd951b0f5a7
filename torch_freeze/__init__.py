"""torch_freeze: freeze parts of a PyTorch network, at no cost for what is frozen."""

"""Optimisers, one file each; found by folder scan (`megatrain.optim.optimizer.OPTIMIZER`)."""

"""Floor 4: checkpoints. Named slices of full tensors to disk and back: any layout writes, any layout reads."""

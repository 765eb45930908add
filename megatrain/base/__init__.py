"""Floor 0: what every other folder may use: errors, registry, units, named randomness, the device, files, logging."""

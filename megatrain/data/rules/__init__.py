"""Rules of quality, one set a file. See `megatrain.data.quality.Rule`."""

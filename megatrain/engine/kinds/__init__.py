"""Engines, one file each; found by folder scan (`megatrain.engine.api.ENGINE`)."""

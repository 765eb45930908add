"""Run files: YAML read with the line of each value, merged, interpolated, and built into frozen dataclasses."""

"""The run: its file, its assembly, the loop, its hooks and its folder."""

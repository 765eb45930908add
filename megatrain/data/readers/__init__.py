"""Readers of file formats, one a file. See `megatrain.data.documents.Reader`."""

"""The mesh of ranks, collectives, and layers cut over tensor-parallel ranks.

A layer receives the one `Axis` it needs. An axis of size 1 is everywhere the same as no parallelism at all.
"""

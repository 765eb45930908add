"""A step watched: operators, bytes, FLOPs, memory, host synchronisations, communication."""

"""Splitting a chain of costed units into contiguous stages; NumPy only, so that any graph can be split by it."""

"""Structured pruning: slices of weights that depend on each other are found on the graph and removed together."""

"""Rule families that make a graph smaller without changing what it computes; each module has ``PASS``."""

"""Backends: from canonical IR to code."""

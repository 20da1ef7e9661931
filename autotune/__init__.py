"""Autotuning: spaces of decisions, search, measurement, and the tuning log."""

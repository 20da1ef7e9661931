"""Tensor computes and, beside each, its schedule."""

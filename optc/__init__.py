"""optc: compile neural networks into one verified, self-contained artifact."""

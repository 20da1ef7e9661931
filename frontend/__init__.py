"""From model files to canonical IR."""

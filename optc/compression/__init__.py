"""Smaller models within a stated accuracy: calibration data, evaluation, search. The rewrites are passes."""

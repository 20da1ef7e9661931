"""Quantization of float32 models. What executes quantized ones is ``passes/integer``."""

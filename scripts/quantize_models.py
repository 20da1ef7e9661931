"""Quantize networks of the model cache to int8 with onnxruntime's static quantizer, for tests and benchmarks.

The models keep float inputs and outputs; QuantizeLinear and DequantizeLinear pairs stand around what runs in int8,
weights have a scale per channel. The calibration data are random, from a fixed seed. The results are written to
``quantized/NAME.onnx`` in the model cache; a model that is there already is kept unless ``--force`` is given.

    python scripts/quantize_models.py               # all
    python scripts/quantize_models.py resnet50
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from export_models import SEED, cache_folder
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

MODELS = ("resnet50", "mobilenetv2", "bert_6")
SAMPLES = 8


class _RandomSamples(CalibrationDataReader):
    """Standard normal values for floats; tokens of BERT's vocabulary, all of one segment, none masked."""

    def __init__(self, model: Path) -> None:
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self._samples = self._make([(i.name, i.shape, i.type) for i in session.get_inputs()])

    def _make(self, inputs: list[tuple[str, list[int], str]]) -> Iterator[dict[str, np.ndarray]]:
        generator = np.random.default_rng(SEED)
        for _ in range(SAMPLES):
            yield {name: _sample(generator, name, shape, kind) for name, shape, kind in inputs}

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next sample, None after the last."""
        return next(self._samples, None)


def _sample(generator: np.random.Generator, name: str, shape: list[int], kind: str) -> np.ndarray:
    if kind == "tensor(float)":
        return generator.standard_normal(shape, np.float32)
    if name == "input_ids":
        return generator.integers(0, 30_000, shape)
    return np.full(shape, int(name == "attention_mask"), np.int64)


def quantize(source: Path, target: Path) -> None:
    """Write the int8 form of the float model ``source`` to ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        whole, prepared, result = (Path(folder) / f"{name}.onnx" for name in ("whole", "prepared", "result"))
        onnx.save(onnx.load(source), whole)  # in one file: the preprocessing loses weights that lie beside the model
        # Folds batch normalizations into convolutions, as onnxruntime recommends to do before.
        quant_pre_process(whole, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            result,
            _RandomSamples(prepared),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
        result.replace(target)
    print(f"wrote {target}")


def main() -> None:
    """Quantize the models named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description="Quantize networks of the model cache to int8.")
    parser.add_argument("models", nargs="*", metavar="model", help=f"{', '.join(MODELS)}; default: all")
    parser.add_argument("--force", action="store_true", help="quantize again what is there already")
    options = parser.parse_args()
    if unknown := [name for name in options.models if name not in MODELS]:
        parser.error(f"unknown model {unknown[0]!r}, choose from {', '.join(MODELS)}")
    cache = cache_folder()
    for name in options.models or MODELS:
        source, target = cache / "exported" / f"{name}.onnx", cache / "quantized" / f"{name}.onnx"
        if target.is_file() and not options.force:
            print(f"{name}: there already")
        elif not source.is_file():
            raise SystemExit(f"{source} is missing; scripts/export_models.py makes it")
        else:
            quantize(source, target)


if __name__ == "__main__":
    main()

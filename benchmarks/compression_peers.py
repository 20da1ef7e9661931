"""What other quantizers make of a model and calibration data: onnxruntime's and NNCF's.

pip install 'optc[peers]'
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx

Calls = list[dict[str, np.ndarray]]
CALIBRATORS = ("MinMax", "Entropy", "Percentile", "Distribution")
"""onnxruntime's names of its calibrators."""


class _Reader:
    """onnxruntime's interface to calibration data."""

    def __init__(self, calls: Calls) -> None:
        self._calls: Iterator[dict[str, np.ndarray]] = iter(calls)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._calls, None)


def onnxruntime_static(file: Path, calls: Calls, method: str, *, per_channel: bool = True) -> onnx.ModelProto:
    """Return what onnxruntime's quantize_static makes after its own preprocessing, with unsigned activations.

    ``method`` is one of CALIBRATORS.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        whole, prepared, result = (Path(folder) / f"{name}.onnx" for name in ("whole", "prepared", "result"))
        onnx.save(onnx.load(file), whole)
        quant_pre_process(whole, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            result,
            _Reader(calls),
            quant_format=QuantFormat.QDQ,
            per_channel=per_channel,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=getattr(CalibrationMethod, method),
        )
        return onnx.load(result)


def nncf_static(file: Path, calls: Calls, *, transformer: bool, accurate: bool = False) -> onnx.ModelProto:
    """Return what ``nncf.quantize`` makes of the file: the mixed preset, asymmetric activations.

    ``transformer`` turns on what it has for attention and SmoothQuant, ``accurate`` its slower correction of biases.
    """
    import nncf

    return nncf.quantize(
        onnx.load(file),
        nncf.Dataset(calls),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        subset_size=len(calls),
        fast_bias_correction=not accurate,
    )

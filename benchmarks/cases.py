"""The models of the benchmarks: their files, the sizes they run at, their PyTorch modules."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("OPTC_MODEL_CACHE") or ROOT / ".cache" / "models")
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """A model at batch 1.

    ``shapes`` are sizes of inputs that the file leaves open: every contestant gets the model with these sizes written
    into it, unless ``any_size``; ``twin`` says that another case has the same model with fixed sizes. ``module`` names
    the recipe of scripts/export_models.py that makes the PyTorch module, ``float_case`` the float32 form of a quantized
    model.
    """

    file: str
    shapes: Shapes = field(default_factory=dict)
    any_size: bool = False
    twin: bool = False
    module: str = ""
    float_case: str = ""


SPEECH: Shapes = {"input": (1, 576), "state": (2, 1, 128)}
CASES = {
    "ResNet-50": Case("exported/resnet50.onnx", module="resnet50"),
    "MobileNetV2": Case("exported/mobilenetv2.onnx", module="mobilenetv2"),
    "ViT-base": Case("exported/vit_base.onnx", module="vit_base"),
    "BERT, 6 layers, 128 tokens": Case("exported/bert_6.onnx", module="bert_6"),
    "MiniLM, 128 tokens": Case("exported/minilm.onnx", module="minilm"),
    "PP-OCRv4 det 640x640": Case("ppocr/det.onnx", {"x": (1, 3, 640, 640)}),
    "PP-OCRv4 rec 48x320": Case("ppocr/rec.onnx", {"x": (1, 3, 48, 320)}),
    "PP-OCRv4 cls 48x192": Case("ppocr/cls.onnx", {"x": (1, 3, 48, 192)}),
    "silero VAD": Case("silero/silero_vad.onnx", SPEECH, any_size=True),  # onnxruntime refuses it with fixed sizes
    "GPT-2 decode, past 256": Case("exported/gpt2_decode.onnx", module="gpt2_decode"),
    "PP-OCRv4 det 640x640, any size": Case("ppocr/det.onnx", {"x": (1, 3, 640, 640)}, any_size=True, twin=True),
    "PP-OCRv4 rec 48x320, any size": Case("ppocr/rec.onnx", {"x": (1, 3, 48, 320)}, any_size=True, twin=True),
    "PP-OCRv4 cls 48x192, any size": Case("ppocr/cls.onnx", {"x": (1, 3, 48, 192)}, any_size=True, twin=True),
    "ResNet-50 int8": Case("quantized/resnet50.onnx", float_case="ResNet-50"),
    "MobileNetV2 int8": Case("quantized/mobilenetv2.onnx", float_case="MobileNetV2"),
    "BERT, 6 layers, int8": Case("quantized/bert_6.onnx", float_case="BERT, 6 layers, 128 tokens"),
}


def kind(case: Case) -> str:
    """Return which table a case belongs to: "float32", "any size" or "int8"."""
    return "int8" if case.float_case else "any size" if case.twin else "float32"


def fixed_file(case: Case, folder: Path) -> Path:
    """Return the model's file, or a copy in ``folder`` with the input sizes written into it."""
    source = CACHE / case.file
    if not source.is_file():
        raise SystemExit(f"{source} is missing; `make all-models` makes it")
    if not case.shapes or case.any_size:
        return source
    model = onnx.load(source)
    for value in model.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, case.shapes.get(value.name, ()), strict=False):
            dim.dim_value = size
    file = folder / source.name
    onnx.save(model, file)
    return file


def make_inputs(case: Case, original: Any) -> dict[str, np.ndarray]:
    """Return random inputs for the captured model ``original``, at addresses that no contestant needs to copy from."""
    from optc import sample, verification
    from optc.driver import specs
    from optc.runtime.inputs import aligned_empty

    inputs = specs(original.graph.inputs)
    sizes = {
        dim: size
        for spec in inputs
        for dim, size in zip(spec.shape, case.shapes.get(spec.name, ()), strict=False)
        if isinstance(dim, str)
    }
    arrays = sample.random_inputs(inputs, dims=sizes, integers=verification.integer_choices(original))
    for name, array in arrays.items():
        arrays[name] = aligned_empty(array.shape, array.dtype)
        arrays[name][...] = array
    return arrays


def torch_module(case: Case) -> Any:
    """Return the PyTorch module of a case with the weights of its ONNX file."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import export_models

    module, _ = export_models.make(case.module)
    return module

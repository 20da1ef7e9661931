"""Trains a CNN and a small vision transformer on handwritten digits, and quantizes both.

    pip install scikit-learn
    python examples/quantize_digits.py [FOLDER]

The 1,797 images of scikit-learn, 8 x 8 pixels; the last 360 are for testing and are never trained on, nor calibrated
with. Writes the models as ONNX into FOLDER, and prints the accuracy in float32, int8 and with weights of 4 bits; then
with fewer bits in weights and activations, as they are rounded and after fine-tuning with the rounding. Takes four
minutes of a core.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from prune_digits import VisionTransformer
from torch import nn
from train_digits import Shifted, digits

import optc
from optc.compression import finetune
from optc.compression.options import Options

STEPS, TUNING_STEPS, BATCH = 1600, 200, 64
BATCHES = ({0: torch.export.Dim("batch", min=1, max=4096)},)
FEWER_BITS = (4, 3)


def cnn() -> nn.Module:
    """Three convolutions with batch normalization."""

    def block(a: int, b: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    layers = [*block(1, 32, 1), *block(32, 64, 2), *block(64, 64, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train(module: nn.Module, steps: int, rate: float) -> nn.Module:
    """Train on shifted images, in place."""
    images = Shifted(*digits()[0], seed=0)
    optimizer = torch.optim.AdamW(module.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for step in range(steps):
        x, y = images.batch(step, 0, BATCH, BATCH)
        loss = F.cross_entropy(module(x), y, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return module


def network(name: str) -> nn.Module:
    """The network called ``cnn`` or ``vit``, trained, in evaluation mode."""
    torch.manual_seed(0)
    return train(cnn() if name == "cnn" else VisionTransformer(), STEPS, 3e-3).eval()


def export(module: nn.Module, path: Path) -> Path:
    """Write the module to ``path``, for any batch size."""
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "verbose": False}
    program = torch.onnx.export(module, (torch.rand(2, 1, 8, 8),), dynamo=True, dynamic_shapes=BATCHES, **names)
    assert program is not None
    program.save(path)
    return path


def calibration() -> list[Any]:
    """512 images of the training set in batches of 32, without their labels."""
    images = digits()[0][0].numpy()
    return [images[start : start + 32] for start in range(0, 512, 32)]


def accuracy(model: Any) -> str:
    """The share of test images that the compiled model tells right."""
    images, labels = digits()[1]
    compiled = optc.compile(model, verify=False).model()
    (found,) = compiled.run({compiled.inputs[0].name: images.numpy()}).values()
    return f"{(found.argmax(1) == labels.numpy()).mean():.2%}"


def main() -> None:
    """Train, quantize, compare."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("cnn", "vit"):
            module = network(name)
            path = export(module, folder / f"{name}.onnx")
            print(f"{name}: float32 {accuracy(path)}", flush=True)
            for options in (Options("int8"), Options("int4-weights", rounding="gptq")):
                quantized = optc.quantize(path, options, calibrate=calibration())
                print(f"{name}: {options.kind} {accuracy(quantized.model)}", flush=True)
            for bits in FEWER_BITS:
                prepared = finetune.prepare(
                    module,
                    (torch.rand(2, 1, 8, 8),),
                    Options("int8", bits=bits),
                    calibrate=calibration(),
                    dynamic_shapes=BATCHES,
                )
                before = accuracy(prepared.quantized().model)
                train(prepared.module, TUNING_STEPS, 1e-3)
                after = accuracy(prepared.quantized().model)
                print(f"{name}: weights of {bits} bits {before}, fine-tuned {after}", flush=True)


if __name__ == "__main__":
    main()

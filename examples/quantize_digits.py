"""Trains a CNN and a small vision transformer on handwritten digits, and quantizes both.

    pip install scikit-learn
    python examples/quantize_digits.py [FOLDER]

The 1,797 images of scikit-learn, 8 x 8 pixels; the last 360 are for testing and are never trained on, nor calibrated
with. Writes the models as ONNX into FOLDER, and prints the accuracy in float32, int8 and with weights of 4 bits.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import optc
from optc.compression.options import Options

STEPS, BATCH = 900, 128


def digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Training and test set, each as images [N, 1, 8, 8] between 0 and 1 and labels [N]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images, labels = (found.images[:, None] / 16).astype(np.float32), found.target
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:-360], order[-360:]
    return (images[train], labels[train]), (images[test], labels[test])


def cnn() -> nn.Module:
    """Three convolutions with batch normalization."""

    def block(a: int, b: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    layers = [*block(1, 32, 1), *block(32, 64, 2), *block(64, 64, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class ViT(nn.Module):
    """Patches of 2 x 2 pixels, a position each, three encoder layers, the mean of the patches."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.positions = nn.Parameter(torch.randn(1, 16, width) * 0.1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.1, "gelu", batch_first=True, norm_first=True)
            for _ in range(3)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 1, 8, 8] to logits [N, 10]."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


def train(module: nn.Module, seed: int) -> nn.Module:
    """Train on shifted images, and return the module for evaluation."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    (images, labels), _ = digits()
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(module.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(x), (BATCH,), generator=generator)
        shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
        loss = F.cross_entropy(module(torch.roll(x[chosen], shift, (2, 3))), y[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return module.eval()


def export(name: str, folder: Path) -> Path:
    """Train the network called ``cnn`` or ``vit`` and write it to ``folder/NAME.onnx``, for any batch size."""
    torch.manual_seed(0)
    module = train(cnn() if name == "cnn" else ViT(), 0)
    path = folder / f"{name}.onnx"
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.onnx.export(
        module,
        (torch.rand(2, 1, 8, 8),),
        dynamo=True,
        verbose=False,
        input_names=["x"],
        output_names=["y"],
        dynamic_shapes=({0: batch},),
    )
    program.save(path)
    return path


def accuracy(artifact: optc.Artifact) -> float:
    """Return the share of test images that are told right."""
    _, (images, labels) = digits()
    found = artifact.model().run({"x": images})["y"]
    return float((found.argmax(1) == labels).mean())


def main() -> None:
    """Train, quantize, compare."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        folder.mkdir(parents=True, exist_ok=True)
        (images, _), _ = digits()
        for name in ("cnn", "vit"):
            path = export(name, folder)
            print(f"{name}: float32 {accuracy(optc.compile(path)):.2%}")
            calibrate = [{"x": images[start : start + 32]} for start in range(0, 512, 32)]
            for options in (Options("int8"), Options("int4-weights", rounding="gptq")):
                quantized = optc.quantize(path, options, calibrate=calibrate)
                print(f"{name}: {options.kind} {accuracy(optc.compile(quantized.model, verify=False)):.2%}")


if __name__ == "__main__":
    main()

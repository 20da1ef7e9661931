"""Prunes half of a convolutional network and of a small vision transformer, recovers them, and compiles both.

    pip install scikit-learn
    python examples/prune_digits.py                      both models; trains for a few minutes
    python examples/prune_digits.py --only vit --ratio 0.7

Trained on handwritten digits as in train_digits.py. Recovery uses 256 training images without their labels. Times are
of one thread, alternating in one process, for batches of 64 images.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from train_digits import accuracy, digits, recipe, train

import optc
from optc.passes.prune.select import Structured
from optc.timing import alternate
from optc.training import Batches, Recipe

BATCH = 64


class Block(nn.Module):
    """Attention and two products, each beside a skip."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        """[N, tokens, width] to the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Images [N, 1, 8, 8] to logits [N, 10]: 16 patches of 2 x 2 pixels."""

    def __init__(self, width=128, heads=8, depth=4):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.place = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        """The mean over patches decides."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def transformer_recipe(steps):
    """How the transformer is trained: a small rate, and images shifted by up to a pixel."""
    torch.manual_seed(0)
    images, labels = digits()[0]
    shifted = [torch.roll(images, (dy, dx), (2, 3)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    data = torch.utils.data.TensorDataset(torch.cat(shifted), labels.repeat(9))
    return Recipe(
        VisionTransformer().train(),
        images[:16],
        F.cross_entropy,
        Batches(data, seed=0),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=5e-2),
        lr_schedule=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps),
    )


def capture(module):
    """The module for any batch, as the compiler's graph."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    return optc.capture(module, example_inputs=(digits()[1][0][:8],), dynamic_shapes=({0: batch},))


def compiled(model):
    """Compile a graph; a function from images to logits."""
    built = optc.compile(model).model()
    built.threads = 1
    (name,) = (spec.name for spec in built.inputs)
    (output,) = (spec.name for spec in built.outputs)
    return lambda images: torch.from_numpy(built.run({name: images.numpy()})[output])


def main():
    """Train, prune, recover, compile, compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=["cnn", "vit"])
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--importance", default="l2")
    options = parser.parse_args()
    how = Structured(options.ratio, criterion=options.importance)
    images = digits()[0][0][:256].numpy()
    for name in [options.only] if options.only else ["cnn", "vit"]:
        steps = {"cnn": 300, "vit": 1000}[name]
        module = train(recipe(64, 3, 0, steps, F.cross_entropy) if name == "cnn" else transformer_recipe(steps), steps)
        model = capture(module)
        source = {str(model.graph.inputs[0].name): images}
        bare = optc.prune(model, structured=how, calibrate=source, samples=256, recover=False)
        small = optc.prune(model, structured=how, calibrate=source, samples=256)
        whole, cut, recovered = (compiled(m) for m in (model, bare.model, small.model))
        batch = digits()[1][0][:BATCH]
        times = alternate({"whole": lambda: whole(batch), "pruned": lambda: recovered(batch)}, seconds=5)  # noqa: B023
        before, after = (t.median for t in times)
        scores = ", ".join(
            f"{k} {accuracy(f):.2%}" for k, f in {"whole": whole, "cut": cut, "recovered": recovered}.items()
        )
        size = small.report["parameters"]
        print(f"{name}: {scores}; {before:.2f} ms -> {after:.2f} ms ({before / after:.2f} x), "
              f"{size[0]:,} -> {size[1]:,} parameters", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

"""Prunes half of a convolutional network and of a small vision transformer, recovers them, and compiles both.

    pip install scikit-learn
    python examples/prune_digits.py                      both models; trains for a few minutes
    python examples/prune_digits.py --only vit --ratio 0.7 --fine-tune 0

Trained on handwritten digits as in train_digits.py. Layers are fitted on 256 training images without their labels;
fine-tuning is taught by the whole network. Times are of one thread, alternating in one process.
"""

import argparse
import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn
from train_digits import MICROBATCH, MICROBATCHES, accuracy, digits, recipe, train

import optc
from optc.compression.masks import structured_masks
from optc.passes.prune.select import Structured
from optc.timing import alternate
from optc.training import Batches, Distillation, Recipe, Trainer

CNN_STEPS, VIT_STEPS = 300, 1600
BATCH = MICROBATCH * MICROBATCHES


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

    def __init__(self, width=64, heads=4, depth=2):
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


def transformer_recipe(steps, module=None, loss_fn=F.cross_entropy, rate=3e-3):
    """How the transformer is trained."""
    torch.manual_seed(0)
    images, labels = digits()[0]
    return Recipe(
        (module or VisionTransformer()).train(),
        images[:MICROBATCH],
        loss_fn,
        Batches(torch.utils.data.TensorDataset(images, labels), seed=0),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=5e-2),
        lr_schedule=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps),
    )


def fine_tuned(module, how, steps):
    """A copy of the module, trained with the zeros that pruning will remove; the module itself teaches it."""
    student = copy.deepcopy(module)
    masks = structured_masks(student, (digits()[0][0][:MICROBATCH],), how)
    loss_fn = Distillation(copy.deepcopy(module), F.cross_entropy, temperature=4.0, alpha=0.9)
    recipe = transformer_recipe(steps, student, loss_fn, rate=1e-3)
    plan = optc.training.plan(student, recipe.example_inputs, {"devices": 1, "microbatches": MICROBATCHES})
    trainer = Trainer(student, loss_fn, plan, recipe.optimizer, lr_schedule=recipe.lr_schedule)
    trainer.set_masks({name: torch.from_numpy(mask) for name, mask in masks.items()})
    for step in range(steps):
        trainer.step(*recipe.data.batch(step, 0, BATCH, BATCH))
    student.load_state_dict(trainer.state_dict())
    return student.eval()


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


def compare(name, module, how, steps):
    """Prune a trained module, recover it in two ways, compile; print accuracies, times and sizes."""
    images = digits()[0][0][:256].numpy()
    model = capture(module)
    source = {str(model.graph.inputs[0].name): images}
    bare = optc.prune(model, structured=how, calibrate=source, samples=256, recover=False)
    small = optc.prune(model, structured=how, calibrate=source, samples=256)
    graphs = {"whole": model, "pruned": bare.model, "fitted without labels": small.model}
    if steps:
        graphs["fine-tuned"] = optc.prune(capture(fine_tuned(module, how, steps)), structured=how).model
    runs = {key: compiled(graph) for key, graph in graphs.items()}
    scores = ", ".join(f"{key} {accuracy(run):.2%}" for key, run in runs.items())
    size = small.report["parameters"]
    print(f"{name}: accuracy: {scores}; {size[0]:,} -> {size[1]:,} parameters", flush=True)
    for count in (1, BATCH):
        batch = digits()[1][0][:count]
        pair = {key: functools.partial(runs[key], batch) for key in ("whole", "fitted without labels")}
        before, after = (t.median for t in alternate(pair, seconds=3))
        print(f"  {count} images: {before:.3f} ms -> {after:.3f} ms, {before / after:.2f} x", flush=True)


def main():
    """Train, then compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=["cnn", "vit"])
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--importance", default="l2", choices=["l1", "l2", "bn"])
    parser.add_argument("--fine-tune", type=int, default=400, metavar="STEPS")
    options = parser.parse_args()
    how = Structured(options.ratio, criterion=options.importance)
    for name in [options.only] if options.only else ["cnn", "vit"]:
        if name == "cnn":
            module = train(recipe(64, 3, 0, CNN_STEPS), CNN_STEPS)
        else:
            module = train(transformer_recipe(VIT_STEPS), VIT_STEPS)
        compare(name, module, how, options.fine_tune)


if __name__ == "__main__":
    main()

"""Trains a small residual network on handwritten digits in a pipeline, alone and taught by a larger one.

    pip install scikit-learn
    python examples/train_digits.py                  one process, 5 seeds, with and without the teacher
    optc plan examples.train_digits:student -c cluster.toml && \\
        optc train examples.train_digits:student --plan plan.json --steps 400 --checkpoints run

The 1,797 images of scikit-learn, 8 x 8 pixels; 360 are for testing and are never trained on. What the command line
trains learns from the labels of all others. The comparison is about few labels: teacher and students know those of 300
images. A student alone can learn from these only; one that is taught learns from the teacher's answers, either to the
same images or to all, which needs no more labels.
"""

import argparse
import functools
import statistics

import torch
import torch.nn.functional as F
from torch import nn

import optc
from optc.training import Distillation, Recipe, Trainer

MICROBATCH, MICROBATCHES, STEPS = 16, 4, 400
LABELED = 300


@functools.cache
def digits():
    """Training and test set, each as images [N, 1, 8, 8] between 0 and 1 and labels [N]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:-360], order[-360:]
    return (images[train], labels[train]), (images[test], labels[test])


class Shifted:
    """Batches of images, each shifted by up to one pixel; they depend on the seed and the step alone.

    Where there are fewer labels than images, the targets of all are -1.
    """

    def __init__(self, images, labels, seed):
        self._padded, self._seed = F.pad(images, (1, 1, 1, 1)), seed
        self._labels = labels if len(labels) == len(images) else torch.full((len(images),), -1)

    def batch(self, step, start, stop, size):
        """See ``optc.training.recipe.Data``."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        index = torch.randint(0, len(self._labels), (size, 1, 1), generator=generator)[start:stop]
        down, right = torch.randint(0, 3, (2, size, 1, 1), generator=generator)[:, start:stop]
        pixels = torch.arange(8)
        images = self._padded[index, 0, down + pixels[:, None], right + pixels]
        return images[:, None], self._labels[index[:, 0, 0]]


class Block(nn.Module):
    """Two convolutions beside a skip."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        """[N, width, 8, 8] to the same."""
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Network(nn.Module):
    """Images [N, 1, 8, 8] to logits [N, 10]."""

    def __init__(self, width, depth):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        """Convolutions, mean over the image, one product."""
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def recipe(width, depth, seed, steps, images=None, labels=None, loss_fn=F.cross_entropy):
    """How a network is trained; on all images and labels unless told otherwise."""
    torch.manual_seed(seed)
    (all_images, all_labels), _ = digits()
    images, labels = all_images if images is None else images, all_labels if labels is None else labels
    return Recipe(
        Network(width, depth).train(),
        images[:MICROBATCH],
        loss_fn,
        Shifted(images, labels, seed),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-2),
        lr_schedule=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps),
    )


def student():
    """What the command line trains."""
    return recipe(8, 2, seed=0, steps=STEPS)


def train(how, steps):
    """Train in this process; the trained module, in evaluation mode."""
    cluster = {"devices": 1, "microbatches": MICROBATCHES}
    plan = optc.training.plan(how.module, how.example_inputs, cluster, costs="roofline")
    trainer = Trainer(how.module, how.loss_fn, plan, how.optimizer, lr_schedule=how.lr_schedule)
    size = MICROBATCH * MICROBATCHES
    for step in range(steps):
        trainer.step(*how.data.batch(step, 0, size, size))
    how.module.load_state_dict(trainer.state_dict())
    return how.module.eval()


@torch.no_grad()
def accuracy(module):
    """Share of the test images that are recognized."""
    images, labels = digits()[1]
    return float((module(images).argmax(-1) == labels).float().mean())


def main():
    """Train the teacher, then the student with and without it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    images, labels = digits()[0]
    few, known = images[:LABELED], labels[:LABELED]
    teacher = train(recipe(24, 3, 100, 2 * options.steps, few, known), 2 * options.steps)
    print(f"teacher, {LABELED} labels: {accuracy(teacher):.2%}", flush=True)
    taught = Distillation(teacher, F.cross_entropy, temperature=2.0, alpha=1.0)
    ways = {
        "alone": (few, known, F.cross_entropy),
        "taught, the same images": (few, known, taught),
        "taught, all images": (images, known, taught),
        "alone, all labels": (images, labels, F.cross_entropy),
    }
    scores = {name: [] for name in ways}
    for seed in range(options.seeds):
        for name, (seen, targets, loss_fn) in ways.items():
            trained = train(recipe(8, 2, seed, options.steps, seen, targets, loss_fn), options.steps)
            scores[name].append(accuracy(trained))
        print(f"seed {seed}: {', '.join(f'{name} {values[-1]:.2%}' for name, values in scores.items())}", flush=True)
    for name, values in scores.items():
        print(f"student {name}: mean {statistics.mean(values):.2%}, least {min(values):.2%}")


if __name__ == "__main__":
    main()

"""Trains a small residual network on handwritten digits in a pipeline, alone and taught by a larger one.

    pip install scikit-learn
    python examples/train_digits.py                  one process, 5 seeds, with and without the teacher
    optc plan examples.train_digits:student -c cluster.toml && \\
        optc train examples.train_digits:student --plan plan.json --steps 400 --checkpoints run

The 1,797 images of scikit-learn, 8 x 8 pixels; the last 360 are for testing and are never trained on.
"""

import argparse
import functools
import statistics

import torch
import torch.nn.functional as F
from torch import nn

import optc
from optc.training import Batches, Distillation, Recipe, Trainer

MICROBATCH, MICROBATCHES, STEPS = 16, 4, 400


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


def recipe(width, depth, seed, steps, loss_fn=F.cross_entropy):
    """How a network is trained."""
    torch.manual_seed(seed)
    images, labels = digits()[0]
    return Recipe(
        Network(width, depth).train(),
        images[:MICROBATCH],
        loss_fn,
        Batches(torch.utils.data.TensorDataset(images, labels), seed=seed),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-3, weight_decay=1e-2),
        lr_schedule=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps),
    )


def student():
    """What the command line trains."""
    return recipe(8, 2, seed=0, steps=STEPS)


def train(how, steps):
    """Train in this process; the trained module, in evaluation mode."""
    plan = optc.training.plan(how.module, how.example_inputs, {"devices": 1, "microbatches": MICROBATCHES})
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
    teacher = train(recipe(32, 4, seed=100, steps=options.steps), options.steps)
    print(f"teacher: {accuracy(teacher):.2%}")
    taught = Distillation(teacher, F.cross_entropy, temperature=4.0, alpha=0.9)
    scores = {"alone": [], "taught": []}
    for seed in range(options.seeds):
        for name, loss_fn in (("alone", F.cross_entropy), ("taught", taught)):
            scores[name].append(accuracy(train(recipe(8, 2, seed, options.steps, loss_fn), options.steps)))
        print(f"seed {seed}: alone {scores['alone'][-1]:.2%}, taught {scores['taught'][-1]:.2%}", flush=True)
    for name, values in scores.items():
        print(f"student {name}: mean {statistics.mean(values):.2%}, least {min(values):.2%}")


if __name__ == "__main__":
    main()

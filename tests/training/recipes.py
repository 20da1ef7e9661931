"""Recipes that tests train by name."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import training_models as models

from optc.training import Batches, Recipe


class Tokens:
    def __len__(self):
        return 64

    def __getitem__(self, index):
        tokens = torch.randint(0, 64, (9,), generator=torch.Generator().manual_seed(index))
        return tokens[:-1], tokens[1:]


class Dropped(models.GPT):
    """Random numbers have to come out the same on any number of stages."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout(0.1)

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(self.positions)
        for layer in self.layers:
            x = self.dropout(layer(x))
        return self.head(self.norm(x))


def gpt():
    torch.manual_seed(0)
    return Recipe(
        Dropped(),
        torch.zeros(2, 8, dtype=torch.long),
        models.cross_entropy,
        Batches(Tokens(), seed=1),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        lr_schedule=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 6),
    )

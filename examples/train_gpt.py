"""Trains a small GPT, byte by byte, on a text file of this repository, in a pipeline of any number of stages.

    optc split examples.train_gpt:recipe --stages 2 -o plan.json
    optc train examples.train_gpt:recipe --plan plan.json --steps 200 --checkpoints run --every 50 --metrics run
    python examples/train_gpt.py --checkpoint run

Killed at any moment, the run continues from its last checkpoint when the second line is given again. The last line
lets the trained model write; it needs no pipeline.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from optc.training import Batches, Recipe, load_weights

TEXT = Path(__file__).parent.parent / "LICENSE"
LENGTH, WIDTH, HEADS, DEPTH, MICROBATCH = 64, 64, 4, 4, 4


class Text:
    """Every window of LENGTH bytes, and the bytes after each."""

    def __init__(self, path=TEXT):
        self._bytes = torch.tensor(list(path.read_bytes()))

    def __len__(self):
        return len(self._bytes) - LENGTH

    def __getitem__(self, start):
        window = self._bytes[start : start + LENGTH + 1]
        return window[:-1], window[1:]


class Layer(nn.Module):
    """Attention to what came before, and two products."""

    def __init__(self):
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm2, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        """[N, LENGTH, WIDTH] to the same."""
        shape = (*x.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (part.reshape(shape).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.dropout(self.out(y))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """Bytes [N, LENGTH] to logits of the next ones [N, LENGTH, 256]; both embeddings are one weight."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        """Embed, layers, product with the embedding."""
        x = self.tokens(tokens) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def loss(logits, targets):
    """Mean over all bytes, in nats."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def recipe():
    """What the command line trains."""
    torch.manual_seed(0)
    return Recipe(
        GPT().train(),
        torch.zeros(MICROBATCH, LENGTH, dtype=torch.long),
        loss,
        Batches(Text(), seed=0),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3),
    )


@torch.no_grad()
def main():
    """Continue a text with the newest checkpoint."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--length", type=int, default=200)
    options = parser.parse_args()
    module = GPT().eval()
    load_weights(options.checkpoint, module)
    text = list(TEXT.read_bytes()[:LENGTH])
    for _ in range(options.length):
        text.append(int(module(torch.tensor([text[-LENGTH:]]))[0, -1].argmax()))
    print(bytes(text[LENGTH:]).decode("utf-8", "replace"))


if __name__ == "__main__":
    main()

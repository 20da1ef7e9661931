"""Models that tests train: each breaks another habit of stock splitters."""

import torch
import torch.nn.functional as F
from torch import nn


class MLP(nn.Module):
    def __init__(self, width=16, depth=8, dropout=0.0):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        for layer in self.layers:
            x = self.dropout(F.gelu(layer(x)))
        return x


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))), inplace=True)


class ResNet(nn.Module):
    """Batch normalization, in-place activations, skips inside blocks."""

    def __init__(self, width=8, depth=6):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    """Every encoder layer has a skip to the decoder layer opposite: they cross all cuts in the middle."""

    def __init__(self, width=16, depth=8):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x):
        skips = []
        for layer in self.layers[: len(self.layers) // 2]:
            x = F.gelu(layer(x))
            skips.append(x)
        for layer in self.layers[len(self.layers) // 2 :]:
            x = F.gelu(layer(x) + skips.pop())
        return x


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.query, self.both, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.heads = heads

    def forward(self, x, memory, mask=None, causal=False):
        batch, length, width = x.shape
        q = self.query(x).reshape(batch, length, self.heads, -1).transpose(1, 2)
        k, v = (
            part.reshape(batch, memory.shape[1], self.heads, -1).transpose(1, 2)
            for part in self.both(memory).chunk(2, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Layer(nn.Module):
    def __init__(self, width, heads=2, cross=False):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        if cross:
            self.norm3, self.cross = nn.LayerNorm(width), Attention(width, heads)

    def forward(self, x, *, memory=None, mask=None, causal=True):
        h = self.norm1(x)
        x = x + self.attention(h, h, mask=None if memory is not None else mask, causal=causal)
        if memory is not None:
            x = x + self.cross(self.norm3(x), memory, mask=mask)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Tied embeddings: the first and the last stage read the same weight."""

    def __init__(self, vocabulary=64, width=16, depth=4, length=8, tied=True):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.register_buffer("positions", torch.arange(length), persistent=False)
        nn.init.normal_(self.wte.weight, std=0.1)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(self.positions[: tokens.shape[1]])
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class EncoderDecoder(nn.Module):
    """An integer mask that every decoder layer reads, and a memory that skips over the decoder."""

    def __init__(self, vocabulary=64, width=16, depth=2):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.encoder = nn.ModuleList(Layer(width) for _ in range(depth))
        self.decoder = nn.ModuleList(Layer(width, cross=True) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, source, target, mask):
        visible = (mask != 0)[:, None, None, :]
        memory = self.embed(source)
        for layer in self.encoder:
            memory = layer(memory, mask=visible, causal=False)
        x = self.embed(target)
        for layer in self.decoder:
            x = layer(x, memory=memory, mask=visible)
        return self.head(x)


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Unusual(nn.Module):
    """Its own backward pass, a codebook that learns without gradients, values read late and only detached, a frozen
    layer, one that is not used, and a weight, an input and a constant among the outputs."""

    def __init__(self, width=16, depth=6):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.layers[1].requires_grad_(False)
        self.unused, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(width))
        self.register_buffer("book", torch.randn(4, width))

    def forward(self, x):
        given, early = x, None
        for index, layer in enumerate(self.layers):
            x = F.gelu(layer(x))
            early = x if early is None else early
            if index == 2:
                nearest = (x[:, None] - self.book).square().sum(-1).argmin(-1)
                with torch.no_grad():
                    self.book.mul_(0.9).index_add_(0, nearest, x, alpha=0.1)
                x = x + (self.book[nearest] - x).detach() + Round.apply(4 * x) / 4
        x = x + early.detach() + early.argmax(-1, keepdim=True)
        return x, {"scale": self.scale, "given": given, "nothing": None}, nearest, 3


def unusual_loss(output, target):
    x, rest, nearest, factor = output
    return F.mse_loss(x * rest["scale"] + rest["given"], target) + 0.01 * factor * nearest.float().mean()


def logits_of(output):
    return getattr(output, "logits", output)


def mse(output, target):
    return F.mse_loss(output, target)


def cross_entropy(output, target):
    logits = logits_of(output)
    return F.cross_entropy(logits.flatten(0, -2).float(), target.flatten())


def transformer(name):
    import transformers

    common = {"vocab_size": 64}
    if name == "gpt2":
        config = transformers.GPT2Config(
            n_layer=4, n_embd=16, n_head=2, n_positions=8, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
            bos_token_id=None, eos_token_id=None, use_cache=False, **common,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    if name == "llama":
        config = transformers.LlamaConfig(
            num_hidden_layers=4, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=8, use_cache=False, bos_token_id=None, eos_token_id=None, **common,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)
    config = transformers.BertConfig(
        num_hidden_layers=4, hidden_size=16, intermediate_size=32, num_attention_heads=2, max_position_embeddings=8,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0, **common,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def build(name, samples):
    """The module, one full batch of inputs and targets of ``samples``, and the loss; the same on every call."""
    torch.manual_seed(0)
    tokens, labels = torch.randint(0, 64, (samples, 8)), torch.randint(0, 64, (samples, 8))
    if name in ("gpt2", "llama", "bert"):
        model = transformer(name).train()
        inputs = (tokens, torch.ones_like(tokens)) if name == "bert" else (tokens,)
        return model, inputs, labels, cross_entropy
    if name == "gpt":
        return GPT(), (tokens,), labels, cross_entropy
    if name == "encoder_decoder":
        mask = (torch.rand(samples, 8) < 0.7).long()
        mask[:, 0] = 1
        return EncoderDecoder(), (tokens, tokens.roll(1, 1), mask), labels, cross_entropy
    if name == "resnet":
        return ResNet(), (torch.randn(samples, 3, 8, 8),), torch.randint(0, 10, (samples,)), F.cross_entropy
    model = {"mlp": MLP, "unet": UNet, "unusual": Unusual}[name]()
    loss = unusual_loss if name == "unusual" else mse
    return model, (torch.randn(samples, 16),), torch.randn(samples, 16), loss

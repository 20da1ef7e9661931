"""Export the standard networks of the tests and benchmarks into the model cache.

The architectures come from ``transformers`` (no download), the weights from a fixed seed (MiniLM has its own, which
fetch_models.py brings), the ONNX files from ``torch.onnx.export(dynamo=True)``. They are written to ``exported/`` in
the model cache, which is ``.cache/models`` or ``$OPTC_MODEL_CACHE``; a model that is there already is kept unless
``--force`` is given.

    python scripts/export_models.py                       # those that the tests need
    python scripts/export_models.py --all                 # those of the benchmarks too
    python scripts/export_models.py resnet50 bert_base    # some
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
SEED = 20_260
BATCH = torch.export.Dim("batch", min=1, max=64)
SEQUENCE = torch.export.Dim("sequence", min=2, max=512)


@dataclass(frozen=True)
class Recipe:
    """How to make one model: the module, the names and shapes of its inputs, its outputs, its free dims.

    A module of ``transformers`` gives the one output; with ``outputs`` the module takes and returns plain tensors.
    """

    build: Callable[[], torch.nn.Module]
    inputs: Mapping[str, tuple[int, ...]]
    output: str = ""
    dynamic: Mapping[int, object] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    tested: bool = False


def _bert(layers: int) -> torch.nn.Module:
    config = transformers.BertConfig(num_hidden_layers=layers)
    return transformers.BertModel(config, add_pooling_layer=True)


def _resnet50() -> torch.nn.Module:
    return _calibrated(transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000)))


def _mobilenetv2() -> torch.nn.Module:
    config = transformers.MobileNetV2Config(num_labels=1001)
    return _calibrated(transformers.MobileNetV2ForImageClassification(config))


def _vit_base() -> torch.nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000))


def cache_folder() -> Path:
    """Return the folder of the model cache."""
    return Path(os.environ.get("OPTC_MODEL_CACHE") or ROOT / ".cache" / "models")


def _minilm() -> torch.nn.Module:
    """MiniLM-L6 with its trained weights, which fetch_models.py brings."""
    from safetensors.torch import load_file

    folder = cache_folder() / "minilm"
    if not (folder / "model.safetensors").is_file():
        raise SystemExit(f"{folder} is missing; scripts/fetch_models.py brings it")
    config = transformers.BertConfig(**json.loads((folder / "config.json").read_text()))
    module = transformers.BertModel(config, add_pooling_layer=False)
    missing, _ = module.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if lost := [key for key in missing if "position_ids" not in key]:
        raise SystemExit(f"{folder}: no weights for {', '.join(lost)}")
    return module


class _DecodeStep(torch.nn.Module):
    """GPT-2 small for one token: takes the keys and values of the past, returns logits and those of the present."""

    def __init__(self) -> None:
        super().__init__()
        self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config())

    def forward(self, input_ids: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cache = transformers.DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        result = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        present = [state for layer in result.past_key_values.layers for state in (layer.keys, layer.values)]
        return (result.logits, *present)


IMAGE = {"pixel_values": (1, 3, 224, 224)}
TEXT = {"input_ids": (1, 128), "attention_mask": (1, 128), "token_type_ids": (1, 128)}
PAST = [f"{i}.{state}" for i in range(12) for state in ("key", "value")]
DECODE = {"input_ids": (1, 1)} | {f"past.{name}": (1, 12, 256, 64) for name in PAST}
RECIPES: dict[str, Recipe] = {
    "resnet50": Recipe(_resnet50, IMAGE, "logits", tested=True),
    "resnet50_dynamic": Recipe(_resnet50, IMAGE, "logits", {0: BATCH}),
    "mobilenetv2": Recipe(_mobilenetv2, IMAGE, "logits", tested=True),
    "mobilenetv2_dynamic": Recipe(_mobilenetv2, IMAGE, "logits", {0: BATCH}),
    "vit_base": Recipe(_vit_base, IMAGE, "logits", tested=True),
    "bert_base": Recipe(lambda: _bert(12), TEXT, "last_hidden_state", tested=True),
    "bert_base_dynamic": Recipe(lambda: _bert(12), TEXT, "last_hidden_state", {0: BATCH, 1: SEQUENCE}),
    "bert_6": Recipe(lambda: _bert(6), TEXT, "last_hidden_state", tested=True),
    "minilm": Recipe(_minilm, TEXT, "last_hidden_state"),
    "gpt2_decode": Recipe(_DecodeStep, DECODE, outputs=("logits", *(f"present.{name}" for name in PAST))),
}


def _calibrated(module: torch.nn.Module) -> torch.nn.Module:
    """Give batch normalizations random scales and the statistics of random data.

    Fresh statistics (mean 0, variance 1) would make folding them trivial, and activations would grow from
    layer to layer.
    """
    for child in module.modules():
        if isinstance(child, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(child.weight, 0.5, 1.5)
            torch.nn.init.normal_(child.bias, 0.0, 0.2)
            child.momentum = 1.0
    module.train()
    with torch.no_grad():
        module(torch.randn(4, 3, 224, 224))
    return module


class _OneOutput(torch.nn.Module):
    """Exposes one tensor of a transformers model instead of its output dictionary."""

    def __init__(self, module: torch.nn.Module, inputs: Sequence[str], output: str) -> None:
        super().__init__()
        self.module, self.names, self.output = module, tuple(inputs), output

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        result = self.module(**dict(zip(self.names, tensors, strict=True)))
        return getattr(result, self.output)


def _example(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if name == "input_ids":
        return torch.randint(0, 30_000, shape)
    if name == "attention_mask":
        return torch.ones(shape, dtype=torch.int64)
    if name == "token_type_ids":
        return torch.zeros(shape, dtype=torch.int64)
    return torch.randn(shape)


def make(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Return model ``name`` as a module of plain tensors, and an example of its inputs in order."""
    recipe = RECIPES[name]
    torch.manual_seed(SEED)
    module = recipe.build()
    if recipe.output:
        module = _OneOutput(module, list(recipe.inputs), recipe.output)
    # Two samples where the batch is free: torch specializes dims whose example is 1.
    shapes = {key: (2, *shape[1:]) if recipe.dynamic else shape for key, shape in recipe.inputs.items()}
    return module.eval(), {key: _example(key, shape) for key, shape in shapes.items()}


def export(name: str, directory: Path) -> None:
    """Export model ``name`` to ``directory/name.onnx`` with its weights in ``name.onnx.data`` beside it."""
    recipe = RECIPES[name]
    module, examples = make(name)
    program = torch.onnx.export(
        module,
        tuple(examples.values()),
        dynamo=True,
        input_names=list(recipe.inputs),
        output_names=list(recipe.outputs) or [recipe.output],
        dynamic_shapes=(tuple(dict(recipe.dynamic) for _ in examples),) if recipe.dynamic else None,
        verbose=False,
    )
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        file = Path(temporary) / f"{name}.onnx"
        program.save(file, external_data=True)
        # The model file last: it is what tells that the export is complete.
        for part in sorted(Path(temporary).iterdir(), reverse=True):
            part.replace(directory / part.name)
    print(f"wrote {directory / file.name}")


def main() -> None:
    """Export the models named on the command line, those of the tests, or all of them."""
    parser = argparse.ArgumentParser(description="Export standard networks into the model cache.")
    parser.add_argument("models", nargs="*", metavar="model", help=f"{', '.join(RECIPES)}; default: the tests' models")
    parser.add_argument("--all", action="store_true", help="the models of the benchmarks too")
    parser.add_argument("--force", action="store_true", help="export again what is there already")
    options = parser.parse_args()
    names = options.models or [name for name, recipe in RECIPES.items() if recipe.tested or options.all]
    if unknown := [name for name in names if name not in RECIPES]:
        parser.error(f"unknown model {unknown[0]!r}, choose from {', '.join(RECIPES)}")
    folder = cache_folder() / "exported"
    for name in names:
        if (folder / f"{name}.onnx").is_file() and not options.force:
            print(f"{name}: there already")
        else:
            export(name, folder)


if __name__ == "__main__":
    main()

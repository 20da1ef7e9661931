"""Capture from PyTorch, tried on every type of model that Transformers has: small ones with random weights.

    python benchmarks/capture.py                     captures and optimizes all, without code (a quarter of an hour)
    python benchmarks/capture.py --compile           compiles them and compares with PyTorch (an hour)
    python benchmarks/capture.py --any-size          batch and length are symbolic
    python benchmarks/capture.py --only 'mixtral|t5'

Each type's default configuration is made small by the names of its numbers. Types that this does not fit, that do not
run with plain inputs, or that torch.export refuses are counted, since they say nothing about optc. Results go to
build/capture.jsonl.
"""

import argparse
import collections
import contextlib
import functools
import inspect
import json
import multiprocessing
import os
import re
import signal
import warnings
from pathlib import Path

import numpy as np
import torch

import optc
from optc import driver

RESULTS = Path(__file__).resolve().parent.parent / "build" / "capture.jsonl"
SECONDS = 150
LARGEST = 60_000_000
LENGTH, OTHER_LENGTH = 32, 20
SIZES = {
    2: "num_hidden_layers encoder_layers decoder_layers n_layer num_layers num_decoder_layers n_layers"
    " num_key_value_heads num_experts_per_tok expand",
    4: "num_attention_heads encoder_attention_heads decoder_attention_heads n_head num_heads n_heads num_experts"
    " num_local_experts n_routed_experts conv_kernel",
    8: "state_size",
    16: "d_kv head_dim attention_window block_size",
    64: "hidden_size d_model n_embd embedding_size dim moe_intermediate_size emb_dim projection_dim",
    128: "intermediate_size encoder_ffn_dim decoder_ffn_dim n_positions max_position_embeddings d_ff hidden_dim"
    " ffn_dim",
    512: "vocab_size",
}
TEXT = ("input_ids", "attention_mask", "decoder_input_ids")


def shrink(config, depth=0):
    """Make a configuration, and those inside of it, small."""
    for size, names in SIZES.items():
        for name in names.split():
            value = getattr(config, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                with contextlib.suppress(Exception):
                    setattr(config, name, min(value, size))
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list):
        with contextlib.suppress(Exception):
            config.layer_types = sorted(set(kinds))[:2] if len(set(kinds)) > 1 else kinds[:2]
    for part in list(vars(config).values()):
        if depth < 2 and hasattr(part, "model_type"):
            shrink(part, depth + 1)


def first(output):
    """Return the first tensor of floats in what a model returns."""
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() else None
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return next((found for part in parts if (found := first(part)) is not None), None)


class Positional(torch.nn.Module):
    """A model whose inputs come by position, and whose output is one tensor."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs):
        """Call the model by keyword."""
        return first(self.model(**dict(zip(self.names, inputs, strict=True))))


def build(name):
    """Return a small model of a type, in evaluation mode, with weights that are nowhere constant."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    config = AutoConfig.for_model(name)
    shrink(config)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    model = AutoModel.from_config(config).eval().float()
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        raise ValueError("it stays large")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and float(parameter.std()) < 1e-3:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model, config


def inputs_for(model, config):
    """Return the names of a model's inputs, and random ones."""
    seen = getattr(config, "vision_config", config)
    size = getattr(seen, "image_size", 224)
    size = size if isinstance(size, int) else size[0] if size else 224
    ids = torch.randint(3, 500, (1, LENGTH))
    audio = getattr(config, "feature_projection_input_dim", getattr(config, "input_feat_per_channel", 80))
    possible = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": ids[:, :16],
        "pixel_values": torch.randn(1, getattr(seen, "num_channels", 3) or 3, size, size),
        "input_values": torch.randn(1, 8000),
        "input_features": torch.randn(1, 64, audio),
    }
    wanted = inspect.signature(model.forward).parameters
    if "input_ids" not in wanted:
        del possible["attention_mask"]
    names = [name for name in wanted if name in possible]
    return names, tuple(possible[name] for name in names)


def attempt(name, compiled, any_size):
    """Return what became of one type."""
    result, stage = {"name": name}, "not built small"
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"{SECONDS} s")))
    signal.alarm(SECONDS)
    try:
        model, config = build(name)
        stage = "does not run so"
        names, inputs = inputs_for(model, config)
        module = Positional(model, names).eval()
        shapes, others = None, inputs
        if any_size:
            batch, length, other = (torch.export.Dim(n, min=2, max=64) for n in ("batch", "length", "other"))
            dims = {"decoder_input_ids": {0: batch, 1: other}}
            each = (dims.get(n, {0: batch, 1: length} if n in TEXT else {0: batch}) for n in names)
            shapes = (tuple(each),)
            inputs = tuple(torch.cat([x, x]) for x in inputs)
            others = tuple(x[:, :OTHER_LENGTH] if n in TEXT else x for n, x in zip(names, inputs, strict=True))
        with torch.no_grad():
            wanted = module(*others).numpy()
            stage = "torch.export refuses"
            program = torch.export.export(module, inputs, dynamic_shapes=shapes)
        stage = "optc refuses"
        if not compiled:
            driver.check(program)
        else:
            artifact = optc.compile(program, verify=False).model()
            arrays = {spec.name: x.numpy() for spec, x in zip(artifact.inputs, others, strict=True)}
            (found, *_) = artifact.run(arrays).values()
            result["error"] = float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-30))
        stage = "fine"
    except Exception as error:
        result["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    finally:
        signal.alarm(0)
    return {**result, "stage": stage}


def prepare():
    """Make a worker quiet, and of one thread."""
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def main():
    """Try all types, print what failed and how many did not."""
    from transformers import CONFIG_MAPPING

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--any-size", action="store_true")
    options = parser.parse_args()
    names = [name for name in sorted(CONFIG_MAPPING.keys()) if re.search(options.only, name)]
    counts = collections.Counter()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    task = functools.partial(attempt, compiled=options.compile, any_size=options.any_size)
    workers = multiprocessing.get_context("spawn").Pool(os.cpu_count(), prepare, maxtasksperchild=20)
    with RESULTS.open("w") as file, workers as pool:
        for result in pool.imap_unordered(task, names):
            counts[result["stage"]] += 1
            file.write(json.dumps(result) + "\n")
            file.flush()
            if result["stage"] in ("fine", "optc refuses"):
                error = f"{result['error']:.1e}" if "error" in result else ""
                print(result["name"], result["stage"], error, result.get("reason", ""), flush=True)
    print(", ".join(f"{stage}: {count}" for stage, count in counts.most_common()))


if __name__ == "__main__":
    main()

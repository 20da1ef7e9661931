"""Random inputs for a model: reproducible, legal for its symbolic dims, in range for indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from optc.errors import UsageError
from optc.runtime.dtypes import numpy_dtype
from optc.runtime.format import TensorSpec

SIZES = ((2, 64, 64), (1, 64, 64), (1, 1, 512), (1, 1, 1))
"""Sizes to try, in this order: of a symbolic first dimension, of one in the middle, of a last one (or the only one).

Most models take the first; 64 is a multiple of the strides that convolutions have. Audio wants frames of some hundred
samples, and recurrent state has the batch in the middle."""


Examples = Sequence[np.ndarray | tuple[int, ...]]
"""What is kept of example inputs: arrays of integers and booleans, and the shapes of floats."""


def default_dims(specs: Sequence[TensorSpec], sizes: tuple[int, int, int] = SIZES[0]) -> dict[str, int]:
    """Return a size for every symbolic dimension of the inputs ``specs``."""
    first, middle, last = sizes
    chosen: dict[str, int] = {}
    for spec in specs:
        for position, dim in enumerate(spec.shape):
            if isinstance(dim, str) and dim not in chosen:
                is_last = position == len(spec.shape) - 1
                chosen[dim] = last if is_last else first if position == 0 else middle
    return chosen


def random_inputs(
    specs: Sequence[TensorSpec],
    *,
    seed: int = 0,
    dims: Mapping[str, int] | None = None,
    integers: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, np.ndarray]:
    """Return one array per input: floats from N(0, 1), booleans and integers at random.

    ``integers`` gives what to choose from by input name (``range`` of an embedding's vocabulary, say); the default is
    0 and 1, which are in range for nearly every index. ``dims`` overrides the sizes of symbolic dimensions.
    """
    sizes = {**default_dims(specs), **(dims or {})}
    unknown = set(dims or {}) - set(default_dims(specs))
    if unknown:
        known = ", ".join(default_dims(specs)) or "none"
        raise UsageError(f"no symbolic dimension called {', '.join(sorted(unknown))}; the model has: {known}")
    generator = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for spec in specs:
        shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
        dtype = numpy_dtype(spec.dtype)
        if spec.dtype == "bool":
            array = generator.integers(0, 2, shape).astype(bool)
        elif np.issubdtype(dtype, np.integer):
            choices = (integers or {}).get(spec.name, range(2))
            array = generator.choice(np.asarray(choices), shape).astype(dtype)
        else:
            array = generator.standard_normal(shape).astype(dtype)
        arrays[spec.name] = array
    return arrays


def around_examples(specs: Sequence[TensorSpec], examples: Examples, seed: int = 0) -> dict[str, np.ndarray] | None:
    """Return the integers of ``examples`` and random floats of the shapes that stand for them, by name.

    Which integers a model takes (lengths, offsets, masks) is hard to guess. None where there are none, or where the
    examples are not what ``specs`` describe.
    """
    if len(specs) != len(examples) or not any(isinstance(e, np.ndarray) for e in examples):
        return None
    sizes: dict[str, int] = {}
    for spec, example in zip(specs, examples, strict=True):
        shape = example.shape if isinstance(example, np.ndarray) else example
        if len(shape) != len(spec.shape):
            return None
        for dim, size in zip(spec.shape, shape, strict=True):
            if (sizes.setdefault(dim, size) if isinstance(dim, str) else dim) != size:
                return None
    arrays = random_inputs(specs, seed=seed, dims=sizes)
    return arrays | {s.name: e for s, e in zip(specs, examples, strict=True) if isinstance(e, np.ndarray)}

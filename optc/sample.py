"""Random inputs for a model: reproducible, legal for its symbolic dims, in range for indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from optc.errors import UsageError
from optc.runtime.dtypes import numpy_dtype
from optc.runtime.format import TensorSpec

BATCH_SIZE = 2
"""Size tried first for a symbolic first dimension."""
OTHER_SIZE = 64
"""Size tried first for any other symbolic dimension: a multiple of the strides that convolutions have."""


def default_dims(specs: Sequence[TensorSpec]) -> dict[str, int]:
    """Return a size for every symbolic dimension of the inputs ``specs``."""
    sizes: dict[str, int] = {}
    for spec in specs:
        for position, dim in enumerate(spec.shape):
            if isinstance(dim, str) and dim not in sizes:
                sizes[dim] = BATCH_SIZE if position == 0 and len(spec.shape) > 1 else OTHER_SIZE
    return sizes


def random_inputs(
    specs: Sequence[TensorSpec],
    *,
    seed: int = 0,
    dims: Mapping[str, int] | None = None,
    integer_limits: Mapping[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """Return one array per input: floats from N(0, 1), booleans at random, integers in ``[0, limit)``.

    ``integer_limits`` gives the limit by input name (an embedding's vocabulary, say); the default is 2, which is
    in range for nearly every index. ``dims`` overrides the sizes of symbolic dimensions.
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
            array = generator.integers(0, (integer_limits or {}).get(spec.name, 2), shape).astype(dtype)
        else:
            array = generator.standard_normal(shape).astype(dtype)
        arrays[spec.name] = array
    return arrays

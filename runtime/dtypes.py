"""Dtypes by the artifact's names, as NumPy dtypes and as DLPack type codes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from optc.runtime.format import ITEM_SIZES

_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "bool": 6}  # DLDataTypeCode of dlpack.h


@cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype called ``name``; bfloat16 comes from ml_dtypes, imported when first needed."""
    if name == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


def dlpack_type(name: str) -> tuple[int, int]:
    """Return the DLPack type code and the number of bits of the dtype called ``name``."""
    return _CODES[name.rstrip("0123456789")], ITEM_SIZES[name] * 8


def name_of(code: int, bits: int) -> str | None:
    """Return the name for a DLPack type code and a number of bits; None if artifacts have no such dtype."""
    return _NAMES.get((code, bits))


_NAMES = {dlpack_type(name): name for name in ITEM_SIZES}

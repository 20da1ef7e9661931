"""Every operator with drawn attributes, shapes and element types, on every target that runs here, against a reference.

A case is a family and a seed; OPTC_CASES=200 draws as many of each family instead of one.
"""

from __future__ import annotations

import os
from itertools import groupby

import operators_attention
import operators_contrib
import operators_contrib_attention
import operators_elementwise
import operators_network
import operators_quantized
import operators_tensor
import operators_vision
import pytest
from operator_case import TARGETS, Case, Draw, complaints

FAMILIES = {
    "attention": operators_attention.FAMILIES,
    "elementwise": operators_elementwise.FAMILIES,
    "tensor": operators_tensor.FAMILIES,
    "network": operators_network.FAMILIES,
    "quantized": operators_quantized.FAMILIES,
    "vision": operators_vision.FAMILIES,
    "contrib": operators_contrib.FAMILIES,
    "contrib attention": operators_contrib_attention.FAMILIES,
}
SEEDS = range(1, 1 + int(os.environ.get("OPTC_CASES", "1")))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_operators(kind: str, seed: int) -> None:
    # A number that cannot be computed exactly is a different one in each family.
    cases = [make(Draw(1000 * seed + k)) for k, make in enumerate(FAMILIES[kind])]

    def opset(case: Case) -> int:
        return case.opset

    groups = [list(group) for _, group in groupby(sorted(cases, key=opset), key=opset)]
    target = TARGETS[(seed + list(FAMILIES).index(kind)) % len(TARGETS)]
    wrong = [text for group in groups for text in complaints(group, target)]
    assert not wrong, f"{target}, seed {seed}:\n" + "\n".join(wrong)

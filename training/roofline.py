"""Costs without running the model: operations and bytes against what this device was measured to do.

For models too large to run on one device. Rates are calibrated by a matrix product, a convolution and a copy.
"""

from __future__ import annotations

import operator
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from optc.training.analysis import Facts
from optc.training.capture import Program
from optc.training.costs import Costs, NodeCost


@dataclass(frozen=True)
class Rates:
    """Operations a second of products and convolutions, bytes a second, seconds of an operator that does nothing."""

    products: float
    convolutions: float
    memory: float
    overhead: float


def calibrate(device: torch.device) -> Rates:
    """Measure this device with the number of threads that torch has now."""
    left, right = torch.randn(512, 512, device=device), torch.randn(512, 512, device=device)
    image, kernel = torch.randn(4, 64, 28, 28, device=device), torch.randn(64, 64, 3, 3, device=device)
    block, small = torch.randn(2**23, device=device), torch.zeros(1, device=device)
    with torch.no_grad():
        product = _seconds(device, lambda: left @ right)
        convolution = _seconds(device, lambda: torch.conv2d(image, kernel, padding=1))
        copy = _seconds(device, block.clone)
        nothing = _seconds(device, lambda: small + 1)
    return Rates(
        products=2 * 512**3 / product,
        convolutions=2 * 4 * 64 * 64 * 9 * 28 * 28 / convolution,
        memory=2 * 4 * 2**23 / copy,
        overhead=nothing,
    )


def estimate(program: Program, facts: dict[fx.Node, Facts], rates: Rates | None = None) -> Costs:
    """Cost every node by the slower of its operations and its bytes; saved are the results that are no views."""
    rates = rates or calibrate(program.examples[0].device)
    nodes = {}
    storages = {leaf.storage for node in program.graph.nodes if node.op == "get_attr" for leaf in facts[node].leaves}
    for node in program.graph.nodes:
        if node.op not in ("call_function", "call_module", "call_method") or node.target is operator.getitem:
            continue
        found = facts[node]
        new = [leaf for leaf in found.leaves if leaf.storage not in storages]
        storages |= {leaf.storage for leaf in new}
        if not new:
            nodes[node.name] = NodeCost(forward=rates.overhead)
            continue
        moved = sum(leaf.bytes for leaf in new)
        moved += sum(leaf.bytes for source in node.all_input_nodes for leaf in facts[source].leaves)
        rate = rates.convolutions if "conv" in str(node.target) else rates.products
        seconds = max(found.flops / rate, moved / rates.memory) + rates.overhead
        learns = any(leaf.requires_grad for leaf in found.leaves)
        read = [leaf for source in node.all_input_nodes if source.op == "get_attr" for leaf in facts[source].leaves]
        weights = any(leaf.requires_grad for leaf in read)
        nodes[node.name] = NodeCost(
            forward=seconds,
            backward_input=seconds if learns else 0.0,
            backward_weight=seconds if learns and weights and found.flops else 0.0,
            saved=float(sum(leaf.bytes for leaf in new)) if learns else 0.0,
            flops=found.flops,
        )
    return Costs(program.fingerprint(), "roofline", nodes)


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    times = []
    for _ in range(12):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])

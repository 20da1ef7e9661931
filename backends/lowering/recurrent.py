"""RNN, GRU and LSTM: one matrix product of all steps with the input weights, then one kernel with the time loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import te, tirx

from optc.backends.kernels import vector_math as vm
from optc.backends.kernels.fused import bits
from optc.backends.lowering import imperative
from optc.backends.lowering import index_math as im
from optc.backends.lowering.emit import as_index
from optc.backends.lowering.matmul import packed, product
from optc.backends.lowering.recurrent_steps import Activation, Layer, Phase, plan, steps_of
from optc.backends.lowering.site import Site
from optc.backends.lowering.table import Table

TABLE = Table()

_DEFAULTS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_ALPHA = {"LeakyRelu": 0.01, "Elu": 1.0, "HardSigmoid": 0.2, "ThresholdedRelu": 1.0, "Affine": 1.0, "ScaledTanh": 1.0}
_BETA = {"HardSigmoid": 0.5, "Affine": 0.0, "ScaledTanh": 1.0}


@TABLE.lowers("RNN", "GRU", "LSTM")
def recurrent(site: Site) -> Any:
    """RNN-22, GRU-22, LSTM-22: all directions, layouts, activations, clip, peepholes, sequence lengths."""
    ranks = {0: 3, 1: 3, 2: 3, 3: 2, 4: 1, 5: 3, 6: 3, 7: 2}
    if any(site.has(k) and site.rank(k) != rank for k, rank in ranks.items()):
        site.impossible("an input has the wrong rank")
    batch_first = site.attr("layout", 0) == 1
    first, second, features = site.shape(0)
    expected = site.shape(1)[2]
    if not site.prove_equal(features, expected) and im.known(features, expected):
        site.impossible(f"the input has {features} features, its weights {expected}")
    steps, batch = (second, first) if batch_first else (first, second)
    hidden, gates = site.shape(2)[-1], _GATES[site.op]
    if not isinstance(hidden, int):
        site.unsupported("the hidden size must be known while compiling")
    direction = site.attr("direction", "forward")
    backward = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
    compute = "float64" if site.dtype(0) == "float64" else "float32"
    lanes = site.target.lanes(bits(compute))
    phases = [
        plan(g, hidden, batch if isinstance(batch, int) else None, lanes, site.target) for g in _phases(site, gates)
    ]
    x = site.reshape(site.check_equal(site.tensor(0), [first, second, expected]), [steps * batch, expected])
    tensors = [_project(site, x, len(backward) * gates * hidden, expected)]
    operands = {"projected": 0}
    for number, phase in enumerate(phases):
        operands[f"weights{number}"] = len(tensors)
        tensors.append(_pack(site, phase, len(backward), hidden))
    state = [batch, len(backward), hidden] if batch_first else [len(backward), batch, hidden]
    for name, index, shape in (
        ("bias", 3, [len(backward), 2 * gates * hidden]),
        ("lengths", 4, [batch]),
        ("h", 5, state),
        ("c", 6, state),
        ("peephole", 7, [len(backward), 3 * hidden]),
    ):
        if site.has(index):
            operands[name] = len(tensors)
            tensors.append(site.check_equal(site.tensor(index), shape))
    layer = Layer(
        op=site.op,
        directions=backward,
        batch_first=batch_first,
        steps=steps,
        batch=batch,
        hidden=hidden,
        gates=gates,
        lanes=lanes,
        compute=compute,
        phases=phases,
        activations=_activations(site, len(backward)),
        operands=operands,
        clip=site.attr("clip"),
        coupled=bool(site.attr("input_forget", 0)),
        linear=bool(site.attr("linear_before_reset", 0)),
    )
    return _emit(site, layer, state, tensors)


def _phases(site: Site, gates: int) -> list[tuple[int, ...]]:
    """Return the gates of each product of a step. A GRU resets the state that it multiplies for its last gate."""
    if site.op == "GRU" and not site.attr("linear_before_reset", 0):
        return [(0, 1), (2,)]
    return [tuple(range(gates))]


def _project(site: Site, x: Any, columns: int, features: Any) -> Any:
    """Multiply all steps with the input weights of all directions."""
    constant = site.constant(1)
    if constant is not None:
        return packed(site, x, constant.reshape(columns, -1).T, name="input_projection")
    weights = site.reshape(site.tensor(1), [columns, features])
    return product(site, x, weights, transpose_b=True, name="input_projection")


def _pack(site: Site, phase: Phase, directions: int, hidden: int) -> Any:
    """Return the recurrent weights ``[D, G*H, H]`` of a phase as ``[D, blocks, H, gates, width]``, zero-padded."""
    count, padded = len(phase.gates), phase.blocks * phase.width
    shape = [directions, phase.blocks, hidden, count, phase.width]
    constant = site.constant(2)
    if constant is not None:
        whole = np.zeros((directions, count, padded, hidden), constant.dtype)
        whole[:, :, :hidden] = constant.reshape(directions, -1, hidden, hidden)[:, list(phase.gates)]
        blocks = whole.reshape(directions, count, phase.blocks, phase.width, hidden).transpose(0, 2, 4, 1, 3)
        return site.weight(np.ascontiguousarray(blocks), "recurrent")

    def compute(r: Any) -> Any:
        def element(d: Any, block: Any, k: Any, gate: Any, j: Any) -> Any:
            column = block * phase.width + j
            row = (gate + phase.gates[0]) * hidden + column
            return tirx.if_then_else(column < hidden, r[d, row, k], tirx.const(0, str(r.dtype)))

        return te.compute([as_index(v) for v in shape], element, "pack")

    return site.emit(compute, site.tensor(2), name="pack")


def _activations(site: Site, directions: int) -> list[list[Activation]]:
    """Return the activations of each direction; alphas and betas go, in order, to those that take one."""
    names = [str(n) for n in site.attr("activations", _DEFAULTS[site.op] * directions)]
    alphas, betas = list(site.attr("activation_alpha", [])), list(site.attr("activation_beta", []))
    functions = []
    for name in names:
        title = next((n for n in _FUNCTIONS if n.lower() == name.lower()), None)
        if title is None:
            site.unsupported(f"unknown activation '{name}'")
        alpha = alphas.pop(0) if title in _ALPHA and alphas else _ALPHA.get(title, 0.0)
        beta = betas.pop(0) if title in _BETA and betas else _BETA.get(title, 0.0)
        functions.append(_bound(_FUNCTIONS[title], alpha, beta))
    per = len(_DEFAULTS[site.op])
    # The schema's default for a one-directional RNN names two.
    if len(functions) < per * directions:
        site.unsupported(f"{len(functions)} activations given, {per * directions} needed")
    return [functions[d * per : (d + 1) * per] for d in range(directions)]


def _bound(function: Callable[[Any, Any, Any], Any], alpha: float, beta: float) -> Activation:
    def apply(x: Any) -> Any:
        dtype = vm.dtype_of(x)
        return function(x, tirx.const(alpha, dtype), tirx.const(beta, dtype))

    return apply


def _zero(x: Any) -> Any:
    return tirx.const(0, vm.dtype_of(x))


def _one(x: Any) -> Any:
    return tirx.const(1, vm.dtype_of(x))


_FUNCTIONS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "Sigmoid": lambda x, a, b: vm.sigmoid(x),
    "Tanh": lambda x, a, b: vm.tanh(x),
    "Relu": lambda x, a, b: tirx.max(x, _zero(x)),
    "Affine": lambda x, a, b: a * x + b,
    "LeakyRelu": lambda x, a, b: tirx.Select(x < _zero(x), a * x, x),
    "ThresholdedRelu": lambda x, a, b: tirx.Select(x > a, x, _zero(x)),
    "ScaledTanh": lambda x, a, b: a * vm.tanh(b * x),
    "HardSigmoid": lambda x, a, b: tirx.max(tirx.min(a * x + b, _one(x)), _zero(x)),
    "Elu": lambda x, a, b: tirx.Select(x < _zero(x), a * vm.expm1_negative(x), x),
    "Softsign": lambda x, a, b: x / (_one(x) + tirx.abs(x)),
    "Softplus": lambda x, a, b: vm.softplus(x),
}


def _emit(site: Site, layer: Layer, last: list[Any], tensors: list[Any]) -> Any:
    """Emit the kernel of all steps; its outputs are all states and the ``last`` ones."""
    dtype, directions = site.dtype(0), len(layer.directions)
    if layer.batch_first:
        sequence = [layer.batch, layer.steps, directions, layer.hidden]
    else:
        sequence = [layer.steps, directions, layer.batch, layer.hidden]
    outputs = [(sequence, dtype), (last, dtype)] + [(last, dtype)] * (site.op == "LSTM")

    def compute(*a: Any) -> Any:
        return list(imperative.procedure(a, outputs, lambda ins, outs: steps_of(layer, ins, outs), site.op.lower()))

    return site.emit(compute, *tensors)[: site.output_count]

"""One compiled model that runs with any of its layers quantized."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as oir

from optc.compression.evaluate import Run
from optc.passes.quantize.static import Plan, StaticPass
from optc.passes.quantize.switchable import SwitchablePass, switches
from optc.passes.quantize.weight_only import WeightOnlyPass
from optc.passes.quantize.weights import Integers


class Mixture:
    """A float32 model, and how its layers are quantized: by a plan, or with packed weights."""

    def __init__(self, model: oir.Model, plan: Plan | None, packed: Mapping[str, Integers] | None = None) -> None:
        self.model, self.plan, self.packed = model, plan, dict(packed or {})

    @property
    def names(self) -> frozenset[str]:
        """The layers."""
        return self.plan.products if self.plan is not None else frozenset(self.packed)

    def with_layers(self, layers: frozenset[str]) -> oir.Model:
        """Return a new model with ``layers`` quantized."""
        result = self.model.clone()
        if self.plan is not None:
            StaticPass(self.plan.restricted(layers)).call(result)
        else:
            WeightOnlyPass({name: array for name, array in self.packed.items() if name in layers}).call(result)
        return result


class Switchboard:
    """Computes both forms of each layer and takes one: no compilation between evaluations."""

    def __init__(self, mixture: Mixture) -> None:
        from optc import driver

        model = mixture.model.clone()
        SwitchablePass(mixture.plan, mixture.packed).call(model)
        self._mixture = mixture
        self._compiled = driver.compile(model, verify=False).model()

    def run(self, layers: frozenset[str]) -> Run:
        """Return the model with ``layers`` quantized, as a function from inputs to outputs."""
        mixture = self._mixture
        feeds = switches(mixture.model, mixture.names, layers, mixture.plan is not None)

        def call(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            found: dict[str, np.ndarray] = self._compiled.run({**inputs, **feeds})
            return found

        return call

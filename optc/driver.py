"""The main road: capture, optimize, build, pack, verify. Everything the command line does starts here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as oir

import optc
from optc import sample, verification
from optc.backends.artifact import Artifact, build_artifact
from optc.backends.base import ALGORITHMS, Build, Target
from optc.errors import NoLegalInputsError, UnsupportedModelError
from optc.frontend.torch import EXAMPLES
from optc.passes import fuse, pipeline
from optc.passes.observer import Observer, PassRecord
from optc.runtime.format import TensorSpec
from optc.sample import Examples
from optc.source import capture

if TYPE_CHECKING:
    from optc.tuning import Tuning

Progress = Callable[[str], None]


@dataclass
class Trace:
    """What a compilation did and how long each stage took; it does not go into the artifact."""

    seconds: dict[str, float] = field(default_factory=dict)
    passes: list[PassRecord] = field(default_factory=list)
    progress: Progress = lambda _: None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as stage ``name`` and announce it."""
        self.progress(name)
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start


@dataclass(frozen=True)
class Tuned:
    """What a tuning log gave to a build: how much of it, for the report, and the records, as text."""

    coverage: dict[str, Any]
    records: str


def compile(
    path_or_model: Any,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    target: str = "cpu",
    input_shapes: Mapping[str, Sequence[int | str]] | None = None,
    dims: Mapping[str, int] | None = None,
    dynamic_shapes: Any = None,
    verify: bool = True,
    tolerance: float | None = None,
    disable_passes: Collection[str] = (),
    observers: Sequence[Observer] = (),
    inputs: Mapping[str, np.ndarray] | None = None,
    tuning: Tuning | None = None,
    trace: Trace | None = None,
) -> Artifact:
    """Compile a model to an artifact.

    Args:
        path_or_model: see ``optc.capture``.
        example_inputs: what an ``nn.Module`` is captured with: positional inputs, or a mapping of those by keyword.
        target: ``cpu`` is this machine; see ``optc targets``.
        input_shapes: fixes whole inputs by name, with sizes or dimension names.
        dims: gives named dimensions a size; what is not given stays symbolic.
        dynamic_shapes: torch.export's, for an ``nn.Module``.
        verify: compare the result with a reference on random inputs (of an ``nn.Module``, with the integers of its
            example inputs), and keep the errors in the report. Artifacts for another machine cannot run here: their
            report says that they were not verified.
        tolerance: allowed error relative to each output's largest magnitude; default by dtype.
        disable_passes: names of graph passes or rules to leave out, or of kernel algorithms (``winograd``).
        observers: see the passes.
        inputs: arrays to verify with, instead of random ones.
        tuning: a tuning log to take decisions from; nothing is measured. The records used go into the artifact.
        trace: collects timings and pass records.

    Raises:
        UsageError, InvalidModelError, UnsupportedModelError, AccuracyError, MissingTuningError.
    """
    trace = trace or Trace()
    with trace.stage("capture"):
        model = capture(
            path_or_model,
            example_inputs=example_inputs,
            dynamic_shapes=dynamic_shapes,
            input_shapes=input_shapes,
            dims=dims,
        )
    original = model.clone() if verify else None
    examples = model.meta.get(EXAMPLES, ())
    algorithms = ALGORITHMS.intersection(disable_passes)
    with trace.stage("optimize"):
        trace.passes = pipeline.run(model, disable=set(disable_passes) - algorithms, observers=observers)
    resolved, build, tuned = _build(model, target, trace, algorithms, tuning)
    with trace.stage("pack"):
        report = _report(trace.passes, build, resolved, tuned)
        artifact = pack(model, build, resolved, report, tuned.records if tuned else "")
    if original is None:
        return artifact.with_report(artifact.report | {"verification": "skipped on request"})
    with trace.stage("verify"):
        return _verified(artifact, original, resolved, inputs, examples, tolerance)


def pack(model: oir.Model, build: Build, target: Target, report: Mapping[str, Any], tuning: str = "") -> Artifact:
    """Return the artifact of what was built from ``model``; ``tuning`` are the records that it used."""
    return build_artifact(
        inputs=specs(model.graph.inputs),
        outputs=specs(model.graph.outputs),
        code=build.code,
        weights=build.weights,
        target=target.describe(),
        report=report,
        metadata={str(k): str(v) for k, v in model.metadata_props.items()},
        memory=_memory(build),
        calls=build.calls,
        alignment=build.alignment,
        tuning=tuning,
    )


def optimize(
    path_or_model: Any,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    input_shapes: Mapping[str, Sequence[int | str]] | None = None,
    dims: Mapping[str, int] | None = None,
    dynamic_shapes: Any = None,
    disable_passes: Collection[str] = (),
    observers: Sequence[Observer] = (),
    portable: bool = True,
    trace: Trace | None = None,
) -> oir.Model:
    """Capture a model and run the graph passes only; ``optc.ir.serialize.save`` writes it as ONNX.

    ``portable`` spells a few operators in the way that more runtimes implement.
    """
    trace = trace or Trace()
    with trace.stage("capture"):
        model = capture(
            path_or_model,
            example_inputs=example_inputs,
            dynamic_shapes=dynamic_shapes,
            input_shapes=input_shapes,
            dims=dims,
        )
    with trace.stage("optimize"):
        trace.passes = pipeline.run(model, disable=disable_passes, observers=observers)
        if portable:
            trace.passes += pipeline.run(model, passes=fuse.portable(), disable=disable_passes, observers=observers)
    return model


def check(path_or_model: Any, *, target: str = "cpu", **capture_options: Any) -> oir.Model:
    """Find out whether a model can be compiled, without generating code; returns the optimized model.

    Raises UnsupportedModelError that names every node at fault.
    """
    model = optimize(path_or_model, portable=False, **capture_options)
    backend(resolve_target(target)).supported(model)
    return model


def resolve_target(name: str) -> Target:
    """Return the target called ``name``."""
    from optc.backends import registry

    return registry.resolve(name)


def backend(target: Target, progress: Progress | None = None, without: Collection[str] = (), tuning: Any = None) -> Any:
    """Return the backend that compiles for ``target``, without some algorithms, as ``tuning`` decides."""
    from optc.backends import registry

    return registry.backend(target, progress, without, tuning)


def specs(values: Sequence[oir.Value]) -> list[TensorSpec]:
    """Return the artifact's description of inputs or outputs. Raises UnsupportedModelError for an unknown rank."""
    result = []
    for value in values:
        if value.dtype is None or value.shape is None:
            raise UnsupportedModelError(
                f"'{value.name}': the rank cannot be told from the model",
                hint="fix the sizes that it depends on with --input-shape or --dim",
            )
        dims = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
        result.append(TensorSpec(str(value.name), value.dtype.numpy().name, dims))
    return result


def _build(
    model: oir.Model, target: str, trace: Trace, without: Collection[str], tuning: Tuning | None
) -> tuple[Target, Build, Tuned | None]:
    with trace.stage("build"):
        resolved = resolve_target(target)
        if tuning is None:
            return resolved, backend(resolved, trace.progress, without).build(model), None
        from optc import tuning as logs

        served, bad = logs.lookup(tuning, resolved)
        build = backend(resolved, trace.progress, without, served).build(model)
        if tuning.required:
            logs.require(build, served)
        coverage = logs.coverage(build, served) | {"log": {"bad_lines": [line.number for line in bad]}}
        return resolved, build, Tuned(coverage, logs.used(build, served))


def _memory(build: Build) -> dict[str, int]:
    memory = {"weights": sum(array.nbytes for array in build.weights.values())}
    if build.activation_bytes is not None:
        memory["activations"] = build.activation_bytes
    return memory


def _report(passes: Sequence[PassRecord], build: Build, target: Target, tuned: Tuned | None) -> dict[str, Any]:
    return {
        "optc": optc.__version__,
        "tvm": version("apache-tvm"),
        "passes": [
            {"name": r.name, "nodes_before": r.nodes_before, "nodes_after": r.nodes_after, "fired": r.fired}
            for r in passes
            if r.modified
        ],
        "kernels": build.kernels,
        "memory": {"planned": build.activation_bytes, "bound": build.least_activation_bytes},
        "caches": {"l1": target.caches.l1, "l2": target.caches.l2},
        "tuning": tuned.coverage if tuned else "none: every kernel has its analytic or generic schedule",
    }


def _verified(
    artifact: Artifact,
    original: oir.Model,
    target: Target,
    inputs: Mapping[str, np.ndarray] | None,
    examples: Examples,
    tolerance: float | None,
) -> Artifact:
    if not target.native:
        note = f"not run: built for {target.triple}, which is not this machine"
        return artifact.with_report(artifact.report | {"verification": note})
    try:
        result = verify_artifact(artifact.model(), original, inputs=inputs, examples=examples, tolerance=tolerance)
    except NoLegalInputsError as error:
        # Which sizes are legal was our guess: that none fits says nothing against the artifact.
        return artifact.with_report(artifact.report | {"verification": f"not run: {error}"})
    result.require(tolerance)
    return artifact.with_report(artifact.report | {"verification": result.describe()})


def verify_artifact(
    model: Any,
    original: oir.Model,
    *,
    inputs: Mapping[str, np.ndarray] | None = None,
    examples: Examples = (),
    seed: int = 0,
    dims: Mapping[str, int] | None = None,
    prefer: str | None = None,
    tolerance: float | None = None,
) -> verification.Verification:
    """Compare a runtime model with the reference for ``original`` on ``inputs``, or on random ones.

    Random inputs have the integers and the sizes of ``examples`` if the reference takes these.

    onnxruntime's own approximations can be off where an output is tiny (its Sigmoid far below zero, for one). So when
    the results differ from it, onnx's reference evaluator decides, and the result's ``reference`` tells the story.

    Raises:
        NoLegalInputsError: the reference refuses all the random inputs that were tried.
    """
    name, reference = verification.reference(original, prefer)
    sizes: dict[str, int] = {}
    described = "given"
    if inputs is not None:
        expected = reference(inputs)
    else:
        around = sample.around_examples(model.inputs, examples, seed)
        inputs, sizes, expected = _legal_inputs(model, original, reference, seed, dims or {}, around)
        described = f"random, seed {seed}" + (", and the integers of the example inputs" if inputs is around else "")
    actual = model.run(inputs)
    errors = verification.compare_all(actual, expected)
    if name.startswith("onnxruntime") and verification.is_quantized(original):
        errors = tuple(verification.with_noise(errors, original, inputs, expected))
    off = [o for o in errors if not o.within(tolerance)]
    if off and prefer is None and name.startswith("onnxruntime"):
        second_name, opinion = _second_opinion(original, inputs, actual)
        if opinion is None:
            name += f" ({second_name})"
        elif all(o.within(tolerance) for o in opinion):
            differs = ", ".join(f"{o.name} by {o.relative:.1e}" for o in off)
            name, errors = f"{second_name} ({name} differs from both: {differs})", opinion
    return verification.Verification(name, described, sizes, errors)


def _second_opinion(
    original: oir.Model, inputs: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray]
) -> tuple[str, tuple[verification.OutputError, ...] | None]:
    """Compare with onnx's reference evaluator; None, and the reason for a name, where it cannot run the model."""
    name, reference = verification.reference(original, "onnx")
    try:
        expected = reference(inputs)
    except Exception as error:  # the evaluator raises errors of every kind for what it lacks
        return f"{name} cannot run it: {type(error).__name__}", None
    return name, verification.compare_all(actual, expected)


def _legal_inputs(
    model: Any,
    original: oir.Model,
    reference: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]],
    seed: int,
    dims: Mapping[str, int],
    first: Mapping[str, np.ndarray] | None,
) -> tuple[Mapping[str, np.ndarray], dict[str, int], dict[str, np.ndarray]]:
    """Return the first inputs that the reference accepts, their sizes if random, and what it makes of them."""
    integers = verification.integer_choices(original)
    tried: list[dict[str, int]] = []
    refusal: Exception | None = None
    if first is not None:
        try:
            return first, {}, reference(first)
        except Exception as error:  # references raise errors of every kind
            refusal = error
    for candidate in sample.SIZES:
        sizes = {**sample.default_dims(model.inputs, candidate), **dims}
        if sizes in tried:
            continue
        tried.append(sizes)
        inputs = sample.random_inputs(model.inputs, seed=seed, dims=sizes, integers=integers)
        try:
            return inputs, sizes, reference(inputs)
        except Exception as error:  # references raise errors of every kind
            refusal = refusal or error
    reason = (str(refusal) or type(refusal).__name__).splitlines()[0]
    raise NoLegalInputsError(
        f"the reference refuses random inputs of every size tried ({len(tried)}): {reason}",
        hint="name sizes that are legal with --dim or --input-shape, or give arrays with `optc verify --input`",
    )

"""What an artifact says about itself: the manifest, its dataclasses, and its strict JSON form.

docs/artifact-format.md describes the file. This module imports neither NumPy nor anything of the compiler.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from optc.errors import ArtifactError, NewerFormatError

FORMAT_VERSION = 2

MANIFEST = "manifest.json"
CODE = "code/model.so"
REPORT = "report.json"
TUNING = "tuning.jsonl"
WEIGHTS = "weights.bin"
REQUIRED_FILES = (CODE, REPORT, WEIGHTS)
"""The files every manifest lists; the tuning records are optional."""

ACTIVATIONS = "activations"
"""Key of ``Manifest.memory``: bytes of the activations, stated only if their sizes are all fixed."""

WEIGHT_ALIGNMENT = 64
"""Generated vector code assumes tensors aligned to a cache line."""

ITEM_SIZES = {
    "bool": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}
"""Bytes per element of each dtype an artifact may use."""

T = TypeVar("T")


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: a dim is an int, or the name of a symbolic dim, or an expression of such names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class WeightSpec:
    """A weight: ``nbytes`` bytes, little-endian, C order, at ``offset`` of weights.bin."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class FileSpec:
    """Size and SHA-256 (hex) of a file in the artifact."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Target:
    """The machine the code was made for.

    ``features`` are LLVM names of the instruction sets the code may use (``avx2``, ``fma``); ``threads`` is
    the number of threads it was built for, if that was fixed.
    """

    kind: str
    triple: str
    cpu: str
    features: tuple[str, ...] = ()
    threads: int | None = None


@dataclass(frozen=True)
class Manifest:
    """All of manifest.json. The function ``entry`` takes the inputs, then the weights, in order.

    With ``calls``, the names of kernels, it takes a clock last: an int64 tensor with two elements for each call of a
    kernel, nanoseconds and count, that the calls add to, or an empty one. The data of inputs starts at multiples of
    ``alignment`` bytes and of their elements' size.
    """

    producer: dict[str, str]
    target: Target
    entry: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[WeightSpec, ...]
    files: dict[str, FileSpec]
    memory: dict[str, int]
    metadata: dict[str, str] = field(default_factory=dict)
    calls: tuple[str, ...] | None = None
    alignment: int = WEIGHT_ALIGNMENT
    format: int = FORMAT_VERSION

    def to_json(self) -> bytes:
        """Return the canonical form: sorted keys, no spaces, UTF-8, nothing that depends on time or place."""
        return canonical_json(asdict(self))

    @property
    def symbolic(self) -> bool:
        """Whether any input has a dim that is not fixed."""
        return any(isinstance(dim, str) for spec in self.inputs for dim in spec.shape)


def canonical_json(value: object) -> bytes:
    """Return ``value`` as JSON with sorted keys; raises ValueError for NaN and infinity."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def parse_json(data: bytes, name: str) -> Any:
    """Parse JSON, refusing repeated keys and non-finite numbers; raises ArtifactError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key is repeated")
        return result

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is not a JSON number")

    try:
        return json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ArtifactError(f"{name} in the artifact is not valid JSON: {error}") from error


def parse_manifest(data: bytes) -> Manifest:
    """Parse and check a manifest.

    Raises NewerFormatError for a later format version and ArtifactError for everything else that is wrong.
    """
    root = _mapping(parse_json(data, MANIFEST), "the top level")
    version = _integer(root.get("format"), "format")
    if version > FORMAT_VERSION:
        raise NewerFormatError(
            f"the artifact has format version {version}; this optc reads up to {FORMAT_VERSION}",
            hint="load it with the optc that wrote it, or a newer one",
        )
    if version != FORMAT_VERSION:
        raise _bad("format", f"unknown version {version}")
    _keys(root, "the top level", required=Manifest.__dataclass_fields__)

    target = _mapping(root["target"], "target")
    _keys(target, "target", required=Target.__dataclass_fields__)
    threads = target["threads"]
    manifest = Manifest(
        producer=_dict(root["producer"], "producer", _text),
        target=Target(
            kind=_name(target["kind"], "target.kind"),
            triple=_name(target["triple"], "target.triple"),
            cpu=_text(target["cpu"], "target.cpu"),
            features=_tuple(target["features"], "target.features", _name),
            threads=None if threads is None else _positive(threads, "target.threads"),
        ),
        entry=_name(root["entry"], "entry"),
        inputs=_tuple(root["inputs"], "inputs", _tensor),
        outputs=_tuple(root["outputs"], "outputs", _tensor),
        weights=_tuple(root["weights"], "weights", _weight),
        files=_dict(root["files"], "files", _file),
        memory=_dict(root["memory"], "memory", _size),
        metadata=_dict(root["metadata"], "metadata", _text),
        calls=None if root["calls"] is None else _tuple(root["calls"], "calls", _name),
        alignment=_positive(root["alignment"], "alignment"),
    )
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    """Check what relates several fields to each other."""
    for label, names in (
        ("inputs", [spec.name for spec in manifest.inputs]),
        ("outputs", [spec.name for spec in manifest.outputs]),
        ("weights", [weight.name for weight in manifest.weights]),
    ):
        if len(set(names)) != len(names):
            raise _bad(label, "a name is repeated")
    for name in REQUIRED_FILES:
        if name not in manifest.files:
            raise _bad("files", f"{name} is missing")
    unknown = set(manifest.files) - {*REQUIRED_FILES, TUNING}
    if unknown:
        raise _bad("files", f"unknown file {min(unknown)!r}")
    end = manifest.files[WEIGHTS].size
    for weight in manifest.weights:
        where = f"weight {weight.name!r}"
        if weight.nbytes != math.prod(weight.shape) * ITEM_SIZES[weight.dtype]:
            raise _bad(where, f"{weight.nbytes} bytes do not hold {weight.dtype}{list(weight.shape)}")
        if weight.offset % WEIGHT_ALIGNMENT or weight.offset + weight.nbytes > end:
            raise _bad(where, f"offset {weight.offset} is unaligned or past the end of {WEIGHTS}")


def _bad(where: str, problem: str) -> ArtifactError:
    return ArtifactError(f"the artifact's manifest is malformed: {where}: {problem}")


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(where, "not an object")
    return value


def _keys(value: Mapping[str, object], where: str, *, required: Mapping[str, object]) -> None:
    missing, extra = required.keys() - value.keys(), value.keys() - required.keys()
    if missing or extra:
        raise _bad(where, f"missing {sorted(missing)}" if missing else f"unknown {sorted(extra)}")


def _dict(value: object, where: str, parse: Callable[[object, str], T]) -> dict[str, T]:
    return {key: parse(item, f"{where}.{key}") for key, item in _mapping(value, where).items()}


def _tuple(value: object, where: str, parse: Callable[[object, str], T]) -> tuple[T, ...]:
    if not isinstance(value, list):
        raise _bad(where, "not a list")
    return tuple(parse(item, f"{where}[{index}]") for index, item in enumerate(value))


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _bad(where, "not a string")
    return value


def _name(value: object, where: str) -> str:
    text = _text(value, where)
    if not text:
        raise _bad(where, "empty")
    return text


def _integer(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _bad(where, "not an integer")
    return value


def _size(value: object, where: str) -> int:
    number = _integer(value, where)
    if not 0 <= number < 1 << 62:
        raise _bad(where, f"{number} is out of range")
    return number


def _positive(value: object, where: str) -> int:
    number = _size(value, where)
    if number < 1:
        raise _bad(where, "not positive")
    return number


def _dtype(value: object, where: str) -> str:
    text = _text(value, where)
    if text not in ITEM_SIZES:
        raise _bad(where, f"unknown dtype {text!r}")
    return text


def _dim(value: object, where: str) -> int | str:
    return _name(value, where) if isinstance(value, str) else _size(value, where)


def _tensor(value: object, where: str) -> TensorSpec:
    item = _mapping(value, where)
    _keys(item, where, required=TensorSpec.__dataclass_fields__)
    return TensorSpec(
        name=_name(item["name"], f"{where}.name"),
        dtype=_dtype(item["dtype"], f"{where}.dtype"),
        shape=_tuple(item["shape"], f"{where}.shape", _dim),
    )


def _weight(value: object, where: str) -> WeightSpec:
    item = _mapping(value, where)
    _keys(item, where, required=WeightSpec.__dataclass_fields__)
    return WeightSpec(
        name=_name(item["name"], f"{where}.name"),
        dtype=_dtype(item["dtype"], f"{where}.dtype"),
        shape=_tuple(item["shape"], f"{where}.shape", _size),
        offset=_size(item["offset"], f"{where}.offset"),
        nbytes=_size(item["nbytes"], f"{where}.nbytes"),
    )


def _file(value: object, where: str) -> FileSpec:
    item = _mapping(value, where)
    _keys(item, where, required=FileSpec.__dataclass_fields__)
    digest = _text(item["sha256"], f"{where}.sha256")
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise _bad(f"{where}.sha256", "not a SHA-256 in hex")
    return FileSpec(size=_size(item["size"], f"{where}.size"), sha256=digest)

"""The devices that a model is to be trained on, from a dictionary or a TOML file.

    devices = 4
    memory = "16 GiB"          # of each device, or a list
    speeds = [1.0, 1.0, 2.0, 2.0]
    bandwidth = 1e9            # bytes per second between neighbours
    reduce_bandwidth = 1e9     # the same while replicas sum their gradients, if that is less
    latency = 50e-6            # seconds a message
    overhead = 5e-4            # seconds that the runtime adds to each forward or backward action of a pipeline
    split_overhead = 2e-4      # seconds that zero bubble adds for each operator with weights, whose gradients wait
    batch = 64                 # samples of a step on all devices together

``pp``, ``dp``, ``schedule``, ``microbatches``, ``recompute`` and ``data_parallel`` fix what else is chosen.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optc.errors import UsageError
from optc.passes.partition.chain import Device, Link
from optc.training import schedules

# Between processes of one machine over gloo; what is planned with them says that they were assumed.
ASSUMED_LATENCY = 50e-6
ASSUMED_BANDWIDTH = 1e9
ASSUMED_OVERHEAD = 5e-4
ASSUMED_SPLIT_OVERHEAD = 2e-4
DATA_PARALLEL = ("ddp", "fsdp")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Cluster:
    """Devices in the order of their ranks; ``None`` is what the planner may choose or measure."""

    devices: int
    memory: tuple[float, ...]
    speeds: tuple[float, ...]
    latency: float | None = None
    bandwidth: float | None = None
    reduce_bandwidth: float | None = None
    overhead: float | None = None
    split_overhead: float | None = None
    pp: int | None = None
    dp: int | None = None
    schedule: str | None = None
    microbatches: int | None = None
    batch: int | None = None
    recompute: bool | None = None
    data_parallel: str | None = None

    @property
    def link(self) -> Link:
        """Between neighbouring ranks."""
        latency = ASSUMED_LATENCY if self.latency is None else self.latency
        return Link(latency, ASSUMED_BANDWIDTH if self.bandwidth is None else self.bandwidth)

    @property
    def action_overhead(self) -> float:
        """What the runtime takes for each action of a pipeline besides its operators, in seconds."""
        return ASSUMED_OVERHEAD if self.overhead is None else self.overhead

    @property
    def weight_overhead(self) -> float:
        """What a backward pass takes more in two parts than in one for each operator with weights, in seconds."""
        return ASSUMED_SPLIT_OVERHEAD if self.split_overhead is None else self.split_overhead

    def reduction_seconds(self, size: float, dp: int, passes: float) -> float:
        """Time that ``dp`` ranks take to exchange ``size`` bytes each in a ring, ``passes`` times around."""
        bandwidth = self.reduce_bandwidth or self.link.bandwidth
        return passes * (dp - 1) / dp * size / bandwidth + 2 * (dp - 1) * self.link.latency

    def device(self, pp_rank: int, pp: int) -> Device:
        """What all replicas of a pipeline rank can do: as much as the weakest of them."""
        ranks = range(pp_rank, self.devices, pp)
        return Device(min(self.speeds[rank] for rank in ranks), min(self.memory[rank] for rank in ranks))


_INTEGERS = ("devices", "pp", "dp", "microbatches", "batch")
_LINK = ("latency", "bandwidth", "reduce_bandwidth")
_KEYS = (*_INTEGERS, "memory", "speeds", *_LINK, "overhead", "split_overhead", "schedule", "recompute", "data_parallel")


def read(source: Cluster | Mapping[str, Any] | str | os.PathLike[str]) -> Cluster:
    """Make a Cluster of a dictionary or of a TOML file; UsageError names the key that is wrong."""
    if isinstance(source, Cluster):
        return source
    if isinstance(source, Mapping):
        return _parse(source, "cluster")
    path = Path(source)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    table = content.get("cluster", content)
    if not isinstance(table, Mapping):
        raise UsageError(f"{path}: cluster must be a table, not {table!r}")
    return _parse(table, str(path))


def _parse(content: Mapping[str, Any], where: str) -> Cluster:
    unknown = sorted(set(content) - set(_KEYS))
    if unknown:
        raise UsageError(f"{where}: unknown key {', '.join(unknown)}", hint=f"keys: {', '.join(_KEYS)}")
    values = dict(content)
    for key in _INTEGERS:
        value = values.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UsageError(f"{where}: {key} must be a positive integer, not {value!r}")
    devices = values.pop("devices", None) or _implied_devices(values)
    schedule = values.pop("schedule", None)
    data_parallel = values.get("data_parallel")
    if data_parallel is not None and data_parallel not in DATA_PARALLEL:
        raise UsageError(f"{where}: data_parallel must be one of {', '.join(DATA_PARALLEL)}, not {data_parallel!r}")
    if values.get("recompute") is not None and not isinstance(values["recompute"], bool):
        raise UsageError(f"{where}: recompute must be true or false")
    return Cluster(
        devices=devices,
        memory=_each(values.pop("memory", float("inf")), devices, f"{where}: memory"),
        speeds=_each(values.pop("speeds", 1.0), devices, f"{where}: speeds"),
        latency=_number(values.pop("latency", None), f"{where}: latency", zero=True),
        bandwidth=_number(values.pop("bandwidth", None), f"{where}: bandwidth"),
        reduce_bandwidth=_number(values.pop("reduce_bandwidth", None), f"{where}: reduce_bandwidth"),
        overhead=_number(values.pop("overhead", None), f"{where}: overhead", zero=True),
        split_overhead=_number(values.pop("split_overhead", None), f"{where}: split_overhead", zero=True),
        schedule=None if schedule is None else schedules.find(str(schedule)).name,
        **values,
    )


def _implied_devices(values: Mapping[str, Any]) -> int:
    if values.get("pp") and values.get("dp"):
        return int(values["pp"] * values["dp"])
    for key in ("memory", "speeds"):
        if isinstance(values.get(key), list | tuple):
            return len(values[key])
    return int(os.environ.get("WORLD_SIZE", values.get("pp") or values.get("dp") or 1))


def _each(value: Any, devices: int, where: str) -> tuple[float, ...]:
    listed = list(value) if isinstance(value, list | tuple) else [value] * devices
    if not listed or len(listed) != devices:
        raise UsageError(f"{where} lists {len(listed)} devices of {devices}")
    return tuple(number for item in listed if (number := _number(item, where)) is not None)


def _number(value: Any, where: str, *, zero: bool = False) -> float | None:
    """A number, or one with a unit such as ``16 GiB`` or ``1 GB/s``."""
    if value is None:
        return None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*(?:e[+-]?\d+)?)\s*([kmgt]?i?)b?(?:/s)?\s*", value, re.IGNORECASE)
        if match is None or match.group(2).lower() not in _UNITS:
            raise UsageError(f"{where}: {value!r} is no size", hint='write a number of bytes or, say, "16 GiB"')
        value = float(match.group(1)) * _UNITS[match.group(2).lower()]
    # Written so that nan fails, too.
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 or (zero and value == 0)):
        raise UsageError(f"{where} must be a positive number, not {value!r}")
    return float(value)

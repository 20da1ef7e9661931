"""The tuning log: what is written is read again, damage is found and named, writers and readers do not meet."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.autotune import log
from optc.autotune.record import BadRecordError, parse
from optc.backends.kernels.decisions import TRACE, number_of
from optc.errors import UsageError


def test_a_record_survives_its_line(record):
    original = record(0.8, noise=0.01, error=2e-7, note="é")
    assert parse(original.line) == original
    assert "\n" not in original.line


def test_a_trace_is_part_of_its_record(record):
    text = '[[["EnterPostproc", [], [], []]], []]'
    original = record(0.8, {TRACE: number_of(text)}, trace=text)
    assert parse(original.line) == original
    for other in (replace(original, trace=""), replace(original, trace=text + " "), record(0.8, trace=text)):
        with pytest.raises(BadRecordError, match="trace"):
            parse(other.line)


def test_appending_keeps_order_and_drops_repetition(record, tmp_path):
    path = tmp_path / "log"
    first, second = record(0.9), record(0.8)
    log.append(path, [first])
    log.append(path, [])
    log.append(path, [second, first])
    assert log.read(path).records == [first, second]


@pytest.mark.parametrize(
    "line, reason",
    [
        ("", None),
        ("nonsense", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('{"crc": 1}', "format None"),
        ('{"crc": 1, "format": 99}', "format 99"),
        ('{"crc": 1, "format": 1}', "checksum"),
        ("[" * 100000, "not a JSON object"),
    ],
)
def test_bad_lines_are_named(record, tmp_path, line, reason):
    path = tmp_path / "log"
    path.write_text(f"{record().line}\n{line}\n{record(0.5).line}\n")
    found = log.read(path)
    assert len(found.records) == 2
    assert [b.number for b in found.bad] == ([2] if reason else [])
    assert all(reason in b.reason for b in found.bad)


@pytest.mark.parametrize(
    "field, value",
    [("seconds", []), ("seconds", [0.0, 1.0]), ("state", "odd"), ("where", "odd"), ("template", "x"), ("machine", {})],
)
def test_lines_with_a_right_checksum_may_be_wrong_still(record, field, value):
    import zlib

    data = json.loads(record().line) | {field: value}
    data.pop("crc")
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    data["crc"] = zlib.crc32(text.encode())
    with pytest.raises(BadRecordError):
        parse(json.dumps(data))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_damage_to_a_line_passes(data):
    line = _LINE.encode()
    kind = data.draw(st.sampled_from(["flip", "cut", "drop"]))
    at = data.draw(st.integers(0, len(line) - 1))
    if kind == "flip":
        damaged = bytearray(line)
        damaged[at] ^= 1 << data.draw(st.integers(0, 6))
    elif kind == "cut":
        damaged = bytearray(line[:at])
    else:
        damaged = bytearray(line[:at] + line[at + 1 :])
    found = log.read_bytes(bytes(damaged) + b"\n")
    # White space and the like may change what is written, but not what it says.
    assert all(r.line == _LINE for r in found.records)


@pytest.fixture(autouse=True)
def _line(record):
    global _LINE
    _LINE = record(0.7).line


def test_one_line_in_twenty_damaged_loads_the_rest(record, tmp_path):
    path, generator = tmp_path / "log", random.Random(0)
    lines = [record(0.5 + i / 1000).line for i in range(400)]
    damaged = sorted(generator.sample(range(400), 20))
    for i in damaged:
        at = generator.randrange(10, len(lines[i]) - 10)
        lines[i] = lines[i][:at] + chr(33 + (ord(lines[i][at]) - 32) % 90) + lines[i][at + 1 :]
    path.write_text("\n".join(lines) + "\n")
    found = log.read(path)
    assert [b.number for b in found.bad] == [i + 1 for i in damaged]
    assert len(found.records) == 380


def test_a_line_being_written_is_left_alone_and_one_never_finished_is_closed(record, tmp_path):
    path = tmp_path / "log"
    log.append(path, [record()])
    with path.open("a") as file:
        file.write(record(0.5).line[:100])
    assert log.read(path).bad == []
    log.append(path, [record(0.6)])
    found = log.read(path)
    assert [b.number for b in found.bad] == [2]
    assert len(found.records) == 2


def test_unreadable_and_unwritable_files(record, tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        log.read(tmp_path / "none")
    with pytest.raises(UsageError, match="cannot write"):
        log.append(tmp_path / "no" / "log", [record()])
    with pytest.raises(UsageError, match="cannot write"):
        log.write(tmp_path / "no" / "log", [record()])
    with pytest.raises(UsageError, match="cannot write"):
        log.rewrite(tmp_path / "no" / "log", lambda found: found.records)


def test_equal_sets_are_equal_bytes(record):
    records = [record(0.9), record(0.8), record(0.7)]
    assert log.dump(records) == log.dump([*reversed(records), records[0]])


def write_some(path, start, name, pipe):
    for number in range(30):
        log.append(path, [replace(start, note=f"{name} {number}")])
        os.write(pipe, f"{number}\n".encode())
    time.sleep(600)


def test_killed_writers_lose_what_they_were_writing_and_nothing_else(record, tmp_path):
    """Two writers are killed at random moments and started again, beside a reader and one who rewrites the log."""
    path, generator, context = tmp_path / "log", random.Random(1), multiprocessing.get_context("fork")
    log.append(path, [record()])
    last: dict[str, int] = {}
    for attempt in range(20):
        reads, writers = {}, []
        for name in (f"{attempt}-a", f"{attempt}-b"):
            reads[name], end = os.pipe()
            writers.append(context.Process(target=write_some, args=(path, record(), name, end), daemon=True))
            writers[-1].start()
            os.close(end)
        time.sleep(generator.random() * 0.05)
        if attempt % 2:
            log.rewrite(path, lambda found: found.records)
        log.read(path)
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        for name, descriptor in reads.items():
            # The second writer holds a copy of the first one's end, and is gone too.
            with os.fdopen(descriptor) as file:
                numbers = file.read().split()
            last[name] = int(numbers[-1]) if numbers else -1
    log.append(path, [record(0.5)])
    found = log.read(path)
    notes = {r.note for r in found.records}
    assert sum(last.values()) > 20
    assert all(f"{name} {number}" in notes for name, end in last.items() for number in range(end + 1))
    # A line is written by one call of the system, which a signal hardly ever tears; then it is the last of its writer.
    assert len(found.bad) <= len(last)

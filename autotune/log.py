"""The tuning log: a file of records, one a line, that many processes append to and read at the same time.

A writer holds the file's lock (``flock``, which the kernel drops with its process, however it ends) while it appends
one line. What a killed writer left unfinished gets an end by the next one and is then a bad line, which readers skip
and name. Readers take no lock: a last line without an end is still being written. The order of lines means nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from optc.autotune.record import BadRecordError, Record, parse
from optc.errors import UsageError


@dataclass(frozen=True)
class BadLine:
    """A line that is no record."""

    number: int
    reason: str
    text: bytes


@dataclass
class Log:
    """What a log says: records, each once, and the lines that are none."""

    records: list[Record] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)


def read(path: Path) -> Log:
    """Read a log; raises UsageError if the file cannot be read. Bad lines are returned, not raised."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the tuning log {path}: {error.strerror}") from error
    return read_bytes(data)


def read_bytes(data: bytes) -> Log:
    """Read the content of a log."""
    log, seen = Log(), set()
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        if not line.strip():
            continue
        try:
            record = parse(line.decode())
        except UnicodeDecodeError:
            log.bad.append(BadLine(number, "damaged: not UTF-8", line))
        except BadRecordError as error:
            log.bad.append(BadLine(number, error.message, line))
        else:
            if record.line not in seen:
                seen.add(record.line)
                log.records.append(record)
    return log


def append(path: Path, records: Iterable[Record]) -> None:
    """Append records, each as a whole or not at all; makes the file if there is none. Raises UsageError."""
    lines = "".join(f"{record.line}\n" for record in records).encode()
    if not lines:
        return
    try:
        with _locked(path) as descriptor:
            end = os.lseek(descriptor, 0, os.SEEK_END)
            torn = end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"
            _write_all(descriptor, b"\n" + lines if torn else lines)
    except OSError as error:
        raise UsageError(f"cannot write the tuning log {path}: {error.strerror}") from error


def rewrite(path: Path, choose: Callable[[Log], Iterable[Record]]) -> None:
    """Replace a log by what ``choose`` keeps of it, atomically, sorted. Others that append meanwhile wait."""
    try:
        with _locked(path):
            write(path, choose(read(path)))
    except OSError as error:
        raise UsageError(f"cannot write the tuning log {path}: {error.strerror}") from error


def write(path: Path, records: Iterable[Record]) -> None:
    """Write a new log, atomically and sorted: equal sets of records are equal bytes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(dump(records))
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def dump(records: Iterable[Record]) -> bytes:
    """Return the lines of records, each once, sorted."""
    return "".join(f"{line}\n" for line in sorted({record.line for record in records})).encode()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Open the file for appending and hold its lock: that of the file which has the name once the lock is held."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _same(descriptor, path):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _same(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]

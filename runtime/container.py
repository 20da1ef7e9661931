"""The container: a zip file whose every byte is determined by its entries' names, sizes, CRCs and data.

Only what an artifact needs of the zip format (PKWARE APPNOTE 6.3) is written or accepted: stored entries,
fixed timestamps, no comments, no zip64 (so a file stays under 4 GiB), the data of each entry aligned by
padding in its extra field. A reader rebuilds all headers from the central directory and compares them
byte by byte, so that damage anywhere outside the data is found here and damage inside it by the hashes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from optc.errors import ArtifactError, OptcError, TruncatedArtifactError, UnsafePathError

MAX_SIZE = (1 << 32) - 1

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_EXTRA = struct.Struct("<2H")
_PADDING_ID = 0xD935  # the extra field that Android's zipalign registered for alignment padding
_VERSION = 20
_UTF8 = 0x800
_TIME, _DATE = 0, 0x21  # 1980-01-01, the zip epoch
_MODE = 0o100644 << 16
_MADE_BY_UNIX = 3 << 8 | _VERSION
_MAX_ENTRIES = 64
_MIN_ALIGNMENT = 64
_PAGE = 4096
_PAGE_FROM = 64 << 10


@dataclass(frozen=True)
class Entry:
    """A stored file: its name, its size in bytes, and the CRC-32 of its data."""

    name: str
    size: int
    crc: int


@dataclass(frozen=True)
class Layout:
    """Where everything is: one header per entry, the offset of each entry's data, and the tail."""

    headers: tuple[bytes, ...]
    offsets: tuple[int, ...]
    tail: bytes
    size: int


def lay_out(entries: Sequence[Entry]) -> Layout:
    """Return the bytes around the data of ``entries``, stored in this order.

    The data of an entry starts at a multiple of 64 bytes, that of an entry of 64 KiB or more at a multiple of
    4096, so that it can be memory-mapped. Raises OptcError if the file would reach 4 GiB.
    """
    headers, offsets, directory, position = [], [], b"", 0
    for entry in entries:
        name = entry.name.encode()
        alignment = _PAGE if entry.size >= _PAGE_FROM else _MIN_ALIGNMENT
        fixed = position + _LOCAL.size + len(name) + _EXTRA.size
        padding = -fixed % alignment
        common = (_VERSION, _UTF8, 0, _TIME, _DATE, entry.crc, entry.size, entry.size, len(name))
        if fixed + padding + entry.size > MAX_SIZE:
            raise OptcError(
                "the artifact would be larger than 4 GiB, which its format does not allow",
                hint="use smaller weights, for instance float16 instead of float32",
            )
        header = _LOCAL.pack(b"PK\3\4", *common, _EXTRA.size + padding) + name
        headers.append(header + _EXTRA.pack(_PADDING_ID, padding) + bytes(padding))
        directory += _CENTRAL.pack(b"PK\1\2", _MADE_BY_UNIX, *common, 0, 0, 0, 0, _MODE, position) + name
        offsets.append(fixed + padding)
        position = fixed + padding + entry.size
    end = _END.pack(b"PK\5\6", 0, 0, len(entries), len(entries), len(directory), position, 0)
    tail = directory + end
    return Layout(tuple(headers), tuple(offsets), tail, position + len(tail))


def read_directory(data: memoryview) -> dict[str, memoryview]:
    """Return the entries of a container by name, as views of ``data``, after checking every header byte.

    Raises TruncatedArtifactError if there is no directory at the end, UnsafePathError for a name that could
    leave the artifact, ArtifactError for anything else that differs from what ``lay_out`` writes.
    """
    entries = _parse_directory(data)
    names = [entry.name for entry in entries]
    for name in names:
        parts = name.split("/")
        if "\\" in name or ":" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise UnsafePathError(
                f"the artifact has an entry with an unsafe name: {name!r}",
                hint="it was not written by optc; do not use it",
            )
    if len(set(names)) != len(names):
        raise ArtifactError("the artifact has two entries of the same name")
    if sum(entry.size for entry in entries) > len(data):
        raise TruncatedArtifactError("the artifact is shorter than the entries it lists")
    layout = lay_out(entries)
    if layout.size != len(data):
        raise ArtifactError(f"the artifact has {len(data)} bytes where its directory describes {layout.size}")
    for entry, header, offset in zip(entries, layout.headers, layout.offsets, strict=True):
        if bytes(data[offset - len(header) : offset]) != header:
            raise ArtifactError(f"the artifact is damaged: the header of {entry.name} is wrong")
    if bytes(data[-len(layout.tail) :]) != layout.tail:
        raise ArtifactError("the artifact is damaged: its directory is wrong")
    return {
        entry.name: data[offset : offset + entry.size] for entry, offset in zip(entries, layout.offsets, strict=True)
    }


def stored_crc(data: memoryview, name: str) -> int:
    """Return the CRC-32 the directory states for ``name``; ``data`` has passed ``read_directory``."""
    return next(entry.crc for entry in _parse_directory(data) if entry.name == name)


def crc32(data: bytes | memoryview, value: int = 0) -> int:
    """Return the CRC-32 of ``data``, continuing from ``value``."""
    return zlib.crc32(data, value)


def _parse_directory(data: memoryview) -> list[Entry]:
    """Read the central directory without trusting it; only its structure is checked."""
    not_one = TruncatedArtifactError(
        "the file is truncated or is not an optc artifact",
        hint="copy it again, or compile the model again",
    )
    if len(data) < _END.size or bytes(data[-_END.size :][:4]) != b"PK\5\6":
        raise not_one
    _, _, _, _, count, size, start, _ = _END.unpack(data[-_END.size :])
    if count > _MAX_ENTRIES or start + size + _END.size != len(data):
        raise not_one
    entries, position = [], start
    for _ in range(count):
        if position + _CENTRAL.size > start + size:
            raise not_one
        fields = _CENTRAL.unpack(data[position : position + _CENTRAL.size])
        crc, stored, name_size = fields[7], fields[8], fields[10]
        position += _CENTRAL.size
        try:
            name = bytes(data[position : position + name_size]).decode()
        except UnicodeDecodeError as error:
            raise ArtifactError("the artifact has an entry whose name is not UTF-8") from error
        position += name_size
        entries.append(Entry(name, stored, crc))
    return entries

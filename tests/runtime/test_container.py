"""The zip container: exact bytes, and nothing else accepted."""

from __future__ import annotations

import io
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optc.errors import ArtifactError, OptcError, TruncatedArtifactError, UnsafePathError
from optc.runtime.container import Entry, crc32, lay_out, read_directory, stored_crc

FILES = {"manifest.json": b"{}", "code/model.so": b"c" * 1000, "weights.bin": b"w" * 70_000}


def pack(files: list[tuple[str, bytes]]) -> bytes:
    layout = lay_out([Entry(name, len(data), crc32(data)) for name, data in files])
    body = b"".join(header + data for header, (_, data) in zip(layout.headers, files, strict=True))
    assert len(body + layout.tail) == layout.size
    return body + layout.tail


PACKED = pack(list(FILES.items()))


def test_round_trip():
    entries = read_directory(memoryview(PACKED))
    assert {name: bytes(data) for name, data in entries.items()} == FILES
    assert stored_crc(memoryview(PACKED), "manifest.json") == crc32(b"{}")


def test_other_tools_read_it():
    with zipfile.ZipFile(io.BytesIO(PACKED)) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == FILES
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


@given(st.lists(st.integers(0, 200_000), max_size=5))
def test_alignment(sizes):
    layout = lay_out([Entry(f"{index}", size, 0) for index, size in enumerate(sizes)])
    for size, offset in zip(sizes, layout.offsets, strict=True):
        assert offset % (4096 if size >= 65536 else 64) == 0


def test_four_gigabytes_are_refused():
    lay_out([Entry("weights.bin", (1 << 32) - 5000, 0)])
    with pytest.raises(OptcError, match="larger than 4 GiB"):
        lay_out([Entry("weights.bin", (1 << 32) - 10, 0)])


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "a/../../b", "code\\model.so", "C:evil", "", "a//b", "./a", "a\0b", "a/"]
)
def test_unsafe_names(name):
    with pytest.raises(UnsafePathError, match="unsafe name"):
        read_directory(memoryview(pack([(name, b"x")])))


def test_duplicate_names():
    with pytest.raises(ArtifactError, match="two entries of the same name"):
        read_directory(memoryview(pack([("a", b"1"), ("a", b"2")])))


def test_compressed_or_commented_archives_are_refused():
    for method, comment in ((zipfile.ZIP_DEFLATED, b""), (zipfile.ZIP_STORED, b""), (zipfile.ZIP_STORED, b"hi")):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            archive.writestr("manifest.json", b"{}" * 100)
            archive.comment = comment
        with pytest.raises(ArtifactError):
            read_directory(memoryview(buffer.getvalue()))


def test_every_byte_outside_the_data_is_checked():
    layout = lay_out([Entry(name, len(data), crc32(data)) for name, data in FILES.items()])
    inside = set()
    for offset, data in zip(layout.offsets, FILES.values(), strict=True):
        inside.update(range(offset, offset + len(data)))
    for position in range(len(PACKED)):
        if position not in inside:
            damaged = bytearray(PACKED)
            damaged[position] ^= 0x10
            with pytest.raises(ArtifactError):
                read_directory(memoryview(damaged))


@given(st.integers(0, len(PACKED) - 1))
def test_truncation(size):
    with pytest.raises(TruncatedArtifactError):
        read_directory(memoryview(PACKED[:size]))


@given(st.binary(max_size=400), st.booleans())
def test_random_bytes(data, with_end):
    if with_end:  # get past the first check
        data += b"PK\5\6" + data[:18].ljust(18, b"\0")
    with pytest.raises(ArtifactError):
        if read_directory(memoryview(data)) == {}:
            raise ArtifactError("empty")


def test_entry_larger_than_the_file():
    layout = lay_out([Entry("a", 1 << 30, 0)])
    start = len(layout.headers[0])
    tail = bytearray(layout.tail)
    tail[-6:-2] = start.to_bytes(4, "little")
    with pytest.raises(TruncatedArtifactError, match="shorter than the entries"):
        read_directory(memoryview(layout.headers[0] + bytes(tail)))

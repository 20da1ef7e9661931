"""Text for the benchmarks of compression: sentences of Python's own documentation, lines and pages drawn of it.

And where the tables of these benchmarks go.
"""

from __future__ import annotations

import functools
import pydoc_data.topics
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cases import CACHE
from PIL import Image, ImageDraw, ImageFilter, ImageFont

FONTS = tuple(sorted(Path("/usr/share/fonts/truetype").glob("*/*.ttf")))
"""TrueType fonts of this machine. Pillow's own is always used too."""
HEIGHT = 48
"""Pixels of a line that the recognizer takes."""


def write_between(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks ``<!-- NAME -->`` and ``<!-- end of NAME -->`` of a page."""
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = page.read_text(encoding="utf-8").split(first)
    page.write_text(f"{before}{first}\n\n{text.strip()}\n\n{last}{rest.split(last)[1]}", encoding="utf-8")


def sentences(count: int, seed: int) -> list[str]:
    """Return different sentences of 30 to 160 characters, in an order that the seed decides."""
    text = re.sub(r"\s+", " ", " ".join(pydoc_data.topics.topics.values()))
    found = {s.strip() for s in re.findall(r"[A-Z][^.!?|:=*`<>\[\]_]{28,158}[.!?]", text)}
    order = np.random.default_rng(seed).permutation(sorted(found))
    if len(order) < count:
        raise SystemExit(f"there are only {len(order)} sentences, not {count}")
    return [str(s) for s in order[:count]]


@dataclass(frozen=True)
class Line:
    """A drawn line of text: the recognizer's input ``[1, 3, 48, W]``, and what it says."""

    pixels: np.ndarray
    text: str


def lines(count: int, seed: int) -> list[Line]:
    """Return lines of 8 to 28 characters in several fonts, sizes and inks, with noise and blur."""
    random = np.random.default_rng(seed)
    words = " ".join(sentences(600, 0)).split()
    found = []
    while len(found) < count:
        start = int(random.integers(len(words) - 6))
        text = " ".join(words[start : start + int(random.integers(1, 6))])[:28].strip()
        if len(text) >= 8:
            found.append(Line(_normalized(_draw(text, random)), text))
    return found


def _font(random: np.random.Generator, size: int) -> ImageFont.FreeTypeFont:
    number = int(random.integers(len(FONTS) + 1))
    font = ImageFont.load_default(size) if number == len(FONTS) else ImageFont.truetype(str(FONTS[number]), size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow without FreeType has none of any size
    return font


def _draw(text: str, random: np.random.Generator) -> Image.Image:
    font = _font(random, int(random.integers(14, 40)))
    left, top, right, bottom = font.getbbox(text)
    margin = int(random.integers(2, 8))
    paper, ink = int(random.integers(190, 256)), int(random.integers(0, 90))
    size = (int(right - left) + 2 * margin + 4, int(bottom - top) + 2 * margin)
    image = Image.new("RGB", size, (paper, paper, max(paper - 12, 0)))
    ImageDraw.Draw(image).text((margin + 2 - left, margin - top), text, fill=(ink, ink, ink), font=font)
    return _worn(image, random)


def _worn(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Blur a third of the images a little, and put noise on all of them."""
    if random.random() < 0.33:
        image = image.filter(ImageFilter.GaussianBlur(float(random.uniform(0.3, 0.8))))
    pixels = np.asarray(image, np.float32)
    noisy = pixels + random.normal(0, float(random.uniform(0, 18)), pixels.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _normalized(image: Image.Image) -> np.ndarray:
    width = max(HEIGHT, round(image.width * HEIGHT / image.height))
    pixels = np.asarray(image.resize((width, HEIGHT), Image.Resampling.BILINEAR), np.float32)[:, :, ::-1]
    return np.ascontiguousarray((pixels / 127.5 - 1.0).transpose(2, 0, 1))[None]


Rectangle = tuple[slice, slice]


def widened(pixels: np.ndarray, width: int) -> np.ndarray:
    """Return a line ``[1, 3, 48, W]`` cut or filled up with grey to a width, as PP-OCR fills up a batch."""
    missing = max(width - pixels.shape[-1], 0)
    return np.ascontiguousarray(np.pad(pixels[..., :width], [(0, 0)] * 3 + [(0, missing)]))


@dataclass(frozen=True)
class Page:
    """A drawn page: the detector's input ``[1, 3, size, size]``, and its lines as (rows, columns).

    A line reaches from ascender to descender, as in the data that such detectors learn from, whatever letters it has.
    """

    pixels: np.ndarray
    lines: tuple[Rectangle, ...]

    @property
    def text(self) -> np.ndarray:
        """Where the lines are, ``[size, size]``."""
        return painted(self.lines, self.pixels.shape[2:])


@functools.cache
def pages(count: int, seed: int, size: int = 320) -> tuple[Page, ...]:
    """Return pages with lines of text strewn over them."""
    random = np.random.default_rng(seed)
    words = " ".join(sentences(600, 0)).split()
    found = []
    for _ in range(count):
        paper = int(random.integers(180, 256))
        page, drawn = Image.new("RGB", (size, size), (paper, paper, paper)), list[Rectangle]()
        top = int(random.integers(4, 30))
        while top < size - 40:
            start = int(random.integers(len(words) - 6))
            text = " ".join(words[start : start + int(random.integers(1, 5))])[:24]
            font = _font(random, int(random.integers(12, 32)))
            ink, place = int(random.integers(0, 90)), (int(random.integers(2, 60)), top)
            draw = ImageDraw.Draw(page)
            draw.text(place, text, fill=(ink, ink, ink), font=font)
            x0, _, x1, _ = (round(edge) for edge in draw.textbbox(place, text, font=font))
            drawn.append((slice(top, min(top + sum(font.getmetrics()), size)), slice(max(x0, 0), min(x1, size))))
            top += int(random.integers(34, 70))
        pixels = np.asarray(_worn(page, random), np.float32)[:, :, ::-1] / 255
        mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        normal = ((pixels - mean) / deviation).astype(np.float32).transpose(2, 0, 1)
        found.append(Page(np.ascontiguousarray(normal)[None], tuple(drawn)))
    return tuple(found)


def rectangles(probabilities: np.ndarray, threshold: float = 0.3, growth: float = 1.6) -> list[Rectangle]:
    """Return the lines that PP-OCR reads off a map ``[H, W]`` of the detector.

    Regions above ``threshold`` whose mean is above 0.5, as boxes; each edge moves out by area / perimeter * ``growth``,
    since the detector learns text shrunk by that (Liao et al., "Real-time Scene Text Detection with Differentiable
    Binarization", 2019).
    """
    from scipy import ndimage

    regions, _ = ndimage.label(probabilities > threshold)
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(regions), 1):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        inside = regions[rows, columns] == number
        if min(height, width) < 3 or probabilities[rows, columns][inside].mean() < 0.5:
            continue
        d = round(height * width / (2 * (height + width)) * growth)
        across = slice(max(columns.start - d, 0), min(columns.stop + d, probabilities.shape[1]))
        found.append((slice(max(rows.start - d, 0), min(rows.stop + d, probabilities.shape[0])), across))
    return found


def painted(lines: Iterable[Rectangle], shape: tuple[int, ...]) -> np.ndarray:
    """Return where any of the rectangles is."""
    found = np.zeros(shape, bool)
    for line in lines:
        found[line] = True
    return found


def matches(found: Sequence[Rectangle], expected: Sequence[Rectangle]) -> int:
    """Return how many of the expected rectangles have one of their own whose intersection over union is above 0.5."""

    def area(rows: slice, columns: slice) -> int:
        return max(rows.stop - rows.start, 0) * max(columns.stop - columns.start, 0)

    def both(a: slice, b: slice) -> slice:
        return slice(max(a.start, b.start), min(a.stop, b.stop))

    left, count = list(found), 0
    for one in expected:
        for other in left:
            common = area(both(one[0], other[0]), both(one[1], other[1]))
            if 2 * common > area(*one) + area(*other) - common:
                left.remove(other)
                count += 1
                break
    return count


def decode(scores: np.ndarray, characters: list[str]) -> str:
    """Greedy CTC decoding of ``[T, classes]``: best class per step, repeats and blanks (class 0) dropped."""
    best = scores.argmax(axis=-1)
    return "".join(characters[c] for i, c in enumerate(best) if c != 0 and (i == 0 or c != best[i - 1]))


def edits(a: str, b: str) -> int:
    """Return the least number of characters to insert, delete or replace (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def tokenizer(length: int = 128) -> object:
    """Return MiniLM's tokenizer, which pads and cuts to ``length`` tokens."""
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(CACHE / "minilm" / "tokenizer.json"))
    found.enable_padding(length=length)
    found.enable_truncation(length)
    return found

"""Curves of a tuning run: a line of block characters for the terminal, an SVG file for the web."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH, _HEIGHT, _MARGIN = 640, 280, 48

Curve = Sequence[tuple[float, int, float]]
"""Elapsed seconds, trials, and the model's time relative to the untuned one."""


def spark(values: Sequence[float], width: int = 40) -> str:
    """Return values as a line of at most ``width`` blocks, scaled between their extremes."""
    if not values:
        return ""
    step = max(1, -(-len(values) // width))
    chosen = list(values[::step])
    low, high = min(chosen), max(chosen)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((v - low) * scale)] for v in chosen)


def curve(points: Curve) -> str:
    """Return an SVG of the predicted time over elapsed seconds; the number of trials is at the end of the axis."""
    if not points:
        points = [(0.0, 0, 1.0)]
    last = max(points[-1][0], 1e-9)
    low = min(0.99, *(p for *_, p in points))

    def x(seconds: float) -> float:
        return _MARGIN + (_WIDTH - 2 * _MARGIN) * seconds / last

    def y(value: float) -> float:
        return _MARGIN + (_HEIGHT - 2 * _MARGIN) * (1 - value) / (1 - low)

    steps = [f"{x(points[0][0]):.1f},{y(points[0][2]):.1f}"]
    for before, here in pairwise(points):
        if here[2] != before[2]:
            steps += [f"{x(here[0]):.1f},{y(before[2]):.1f}", f"{x(here[0]):.1f},{y(here[2]):.1f}"]
    steps.append(f"{x(last):.1f},{y(points[-1][2]):.1f}")
    bottom, end = _HEIGHT - _MARGIN, f"{last:.0f} s, {points[-1][1]} trials"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
            'font-size="12">',
            f'<path d="M{_MARGIN},{_MARGIN} V{bottom} H{_WIDTH - _MARGIN}" fill="none" stroke="#888"/>',
            f'<polyline points="{" ".join(steps)}" fill="none" stroke="#06c" stroke-width="2"/>',
            f'<text x="4" y="{_MARGIN + 4}">1.00</text>',
            f'<text x="4" y="{bottom}">{low:.2f}</text>',
            f'<text x="{_MARGIN}" y="{_HEIGHT - 16}">0 s</text>',
            f'<text x="{_WIDTH - _MARGIN}" y="{_HEIGHT - 16}" text-anchor="end">{end}</text>',
            f'<text x="{_WIDTH // 2}" y="24" text-anchor="middle">time by the best kernels, untuned = 1</text>',
            "</svg>",
            "",
        ]
    )

"""The plot of a search: cost against loss, each mixture a point, the Pareto front a line."""

from __future__ import annotations

from collections.abc import Sequence

_WIDTH, _HEIGHT, _MARGIN = 640, 360, 56


def plot(
    points: Sequence[dict[str, float]], front: Sequence[dict[str, float]], limit: float, labels: tuple[str, str]
) -> str:
    """Return an SVG. Points have ``cost`` and ``loss``; ``labels`` name the axes; ``limit`` is the budget's line."""
    costs, losses = [p["cost"] for p in points], [min(p["loss"], 1e9) for p in points]
    low_x, high_x = min(costs), max(costs)
    low_y, high_y = min(0.0, *losses), max(limit, *losses)

    def x(cost: float) -> float:
        return _MARGIN + (_WIDTH - 2 * _MARGIN) * (cost - low_x) / ((high_x - low_x) or 1.0)

    def y(loss: float) -> float:
        return _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * (min(loss, 1e9) - low_y) / ((high_y - low_y) or 1.0)

    dots = [f'<circle cx="{x(p["cost"]):.1f}" cy="{y(p["loss"]):.1f}" r="3" fill="#999"/>' for p in points]
    line = " ".join(f"{x(p['cost']):.1f},{y(p['loss']):.1f}" for p in front)
    bottom, right = _HEIGHT - _MARGIN, _WIDTH - _MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
            'font-size="12">',
            f'<path d="M{_MARGIN},{_MARGIN} V{bottom} H{right}" fill="none" stroke="#888"/>',
            f'<path d="M{_MARGIN},{y(limit):.1f} H{right}" fill="none" stroke="#c33" stroke-dasharray="4 3"/>',
            f'<text x="{right}" y="{y(limit) - 4:.1f}" text-anchor="end" fill="#c33">budget {limit:g}</text>',
            *dots,
            f'<polyline points="{line}" fill="none" stroke="#06c" stroke-width="2"/>',
            *[f'<circle cx="{x(p["cost"]):.1f}" cy="{y(p["loss"]):.1f}" r="4" fill="#06c"/>' for p in front],
            f'<text x="{_MARGIN}" y="{bottom + 18}">{low_x:.4g}</text>',
            f'<text x="{right}" y="{bottom + 18}" text-anchor="end">{high_x:.4g}</text>',
            f'<text x="{_WIDTH // 2}" y="{bottom + 36}" text-anchor="middle">{labels[0]}</text>',
            f'<text x="{_MARGIN - 6}" y="{bottom}" text-anchor="end">{low_y:.3g}</text>',
            f'<text x="{_MARGIN - 6}" y="{_MARGIN}" text-anchor="end">{high_y:.3g}</text>',
            f'<text x="{_MARGIN}" y="{_MARGIN - 16}">{labels[1]}</text>',
            "</svg>",
            "",
        ]
    )

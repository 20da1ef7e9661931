"""A picture of a simulated step: what each rank does when, as SVG, alone or in a page with the plan's report."""

from __future__ import annotations

from jinja2 import Environment

from optc.training.simulate import Timeline

_WIDTH, _ROW, _LEFT, _TOP = 1200, 34, 64, 30
_COLORS = {"F": "#6ea8dc", "B": "#8cc08a", "I": "#8cc08a", "W": "#d9b36c"}
_NAMES = {"F": "forward", "B": "backward", "I": "gradients of inputs", "W": "gradients of weights"}

_SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ width }} {{ height }}" font-family="sans-serif" font-size="11">
<rect width="{{ width }}" height="{{ height }}" fill="white"/>
{%- for kind, x in legend %}
<rect x="{{ x }}" y="8" width="12" height="12" fill="{{ colors[kind] }}"/>
<text x="{{ x + 16 }}" y="18">{{ names[kind] }}</text>
{%- endfor %}
{%- for rank in range(ranks) %}
<text x="4" y="{{ top + row * rank + 21 }}">rank {{ rank }}</text>
{%- endfor %}
{%- for box in boxes %}
<rect x="{{ box.x }}" y="{{ box.y }}" width="{{ box.width }}" height="26" fill="{{ box.color }}" \
fill-opacity="{{ box.opacity }}" stroke="white" stroke-width="0.5"><title>{{ box.title }}</title></rect>
{%- if box.width > 14 %}
<text x="{{ box.x + box.width / 2 }}" y="{{ box.y + 17 }}" text-anchor="middle">{{ box.label }}</text>
{%- endif %}
{%- endfor %}
<text x="{{ left }}" y="{{ height - 6 }}">0 ms</text>
<text x="{{ width - 6 }}" y="{{ height - 6 }}" text-anchor="end">{{ seconds }} ms, bubble {{ bubble }} %</text>
</svg>
"""

_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title></head>
<body><h1>{{ title }}</h1>
{{ picture | safe }}
<pre>{{ report }}</pre>
</body></html>
"""

_environment = Environment(autoescape=True, keep_trailing_newline=True)


def svg(timeline: Timeline) -> str:
    """The picture. Later stages of a rank are paler; hover over a box for its numbers."""
    total = float(timeline.seconds) or 1.0
    scale = (_WIDTH - _LEFT - 8) / total
    stages = max(event.action.stage for event in timeline.events) + 1
    boxes = []
    for event in timeline.events:
        kind, stage, microbatch = event.action
        start, stop = float(event.start), float(event.stop)
        boxes.append(
            {
                "x": round(_LEFT + start * scale, 2),
                "y": _TOP + _ROW * event.rank + 4,
                "width": round((stop - start) * scale, 2),
                "color": _COLORS[kind],
                "opacity": round(1 - 0.5 * stage / stages, 2),
                "label": microbatch,
                "title": f"{_NAMES[kind]}, stage {stage}, microbatch {microbatch}: "
                f"{start * 1e3:.3f} to {stop * 1e3:.3f} ms",
            }
        )
    kinds = sorted({event.action.kind for event in timeline.events})
    return _environment.from_string(_SVG).render(
        width=_WIDTH,
        height=_TOP + _ROW * timeline.ranks + 24,
        ranks=timeline.ranks,
        row=_ROW,
        top=_TOP,
        left=_LEFT,
        colors=_COLORS,
        names=_NAMES,
        legend=[(kind, _LEFT + 170 * index) for index, kind in enumerate(kinds)],
        boxes=boxes,
        seconds=f"{total * 1e3:.2f}",
        bubble=f"{100 * float(timeline.bubble):.1f}",
    )


def page(timeline: Timeline, title: str, report: str) -> str:
    """A page of HTML with the picture and the report; nothing else has to be loaded."""
    return _environment.from_string(_PAGE).render(title=title, picture=svg(timeline), report=report)

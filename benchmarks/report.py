"""Tables of the measurements: on the terminal, as a page, as a drawing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import geometric_mean
from typing import Any
from xml.etree import ElementTree as Xml

from rich.console import Console
from rich.table import Table

PEERS = {
    "onnxruntime": "onnxruntime",
    "openvino": "OpenVINO",
    "torch": "torch",
    "torch.compile": "torch.compile",
    "tvm": "TVM",
}
Result = dict[str, Any]


def median(result: Result, threads: str, name: str) -> float | None:
    """Return a contestant's median in milliseconds, None if it has none."""
    timing = result["times"].get(threads, {}).get(name)
    return None if timing is None else float(timing["median_ms"])


def ratio(result: Result, threads: str) -> float | None:
    """Return the best peer's median over optc's."""
    ours = median(result, threads, "optc")
    theirs = [t for peer in PEERS if (t := median(result, threads, peer)) is not None]
    return min(theirs) / ours if theirs and ours else None


def mean_ratio(results: dict[str, Result], kind: str, threads: str) -> float | None:
    """Return the geometric mean of the ratios of a kind of cases."""
    values = [r for result in results.values() if result["kind"] == kind and (r := ratio(result, threads))]
    return geometric_mean(values) if values else None


def speed(result: Result, threads: str) -> float | None:
    """Return optc's GFLOP/s, by the operations that the original graph asks for."""
    ours = median(result, threads, "optc")
    return result["flops"] / ours / 1e6 if ours and result["flops"] else None


def milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def megabytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e6:.0f}"


def terminal() -> Console:
    """Return a console that is wide enough for the tables where nobody looks at it directly."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def counts(results: dict[str, Result]) -> list[str]:
    return sorted({threads for r in results.values() for threads in r["times"]}, key=int)


def show(name: str, result: Result) -> None:
    """Print what was measured of one model."""
    table = Table(title=f"{name}: median milliseconds", title_justify="left")
    for header in ("threads", "optc", *PEERS.values(), "ratio", "GFLOP/s"):
        table.add_column(header, justify="right")
    for threads in counts({name: result}):
        times = [milliseconds(median(result, threads, n)) for n in ("optc", *PEERS)]
        table.add_row(threads, *times, number(ratio(result, threads)), number(speed(result, threads), ".1f"))
    console = terminal()
    console.print(table)
    for threads, missing in result["missing"].items():
        for peer, why in missing.items():
            if why.startswith("fails"):
                console.print(f"  {peer}, {threads} thread(s): {why}", markup=False)
    memory = " / ".join(megabytes(result["peak_memory"][n]) for n in ("optc", "onnxruntime"))
    console.print(f"  peak memory optc / onnxruntime {memory} MB, compiled in {result['compile']:.1f} s")


def summarize(about: Result, results: dict[str, Result]) -> None:
    """Print the means over all models."""
    console = terminal()
    for threads, limits in about["limits"].items():
        means = ", ".join(
            f"{kind} {number(mean)}"
            for kind in ("float32", "any size", "int8")
            if (mean := mean_ratio(results, kind, threads)) is not None
        )
        peak = f"peak {limits['gflops']:.0f} GFLOP/s, {limits['bandwidth']:.0f} GB/s"
        console.print(f"{threads} thread(s), {peak}; ratio to the best peer, geometric mean: {means}", highlight=False)


def write(folder: Path, name: str, about: Result, results: dict[str, Result]) -> None:
    """Write the page ``name``.md into ``folder``, its numbers to ``name``.json and its picture to ``name``.svg."""
    text = json.dumps({"machine": about, "models": results}, indent=1, sort_keys=True)
    (folder / f"{name}.json").write_text(text + "\n")
    (folder / f"{name}.svg").write_bytes(drawing(results))
    (folder / f"{name}.md").write_text(page(name, about, results))


def page(name: str, about: Result, results: dict[str, Result]) -> str:
    """Return the page ``name``."""
    description = about["description"]
    caches = ", ".join(f"{level} {size}" for level, size in description["caches"].items())
    lines = [
        "# Performance",
        "",
        "`make performance` measures this page. Batch 1, no tuning; every contestant runs the same inputs in the same",
        "process, in turns, and the median of its runs counts. *Ratio* is the fastest peer's time over optc's: above 1",
        "optc is the fastest. GFLOP/s count the operations of the original graph, so algorithms that need fewer",
        "(Winograd) can pass the peak. int8 models come from onnxruntime's static quantizer (QDQ, per channel).",
        "",
        f"{description['cpu']} ({description['llvm']}; {', '.join(description['features'])}), {description['cores']} "
        f"cores, {caches}, {description['memory_gb']} GB; {description['system']}.",
        "",
        "| threads | FMA peak, float32 | memory reads | ratio, float32 | any size | int8 |",
        "|---|---|---|---|---|---|",
    ]
    for threads, limits in about["limits"].items():
        means = [number(mean_ratio(results, kind, threads)) for kind in ("float32", "any size", "int8")]
        peak = f"{limits['gflops']:.0f} GFLOP/s | {limits['bandwidth']:.0f} GB/s"
        lines.append(f"| {threads} | {peak} | {' | '.join(means)} |")
    lines += ["", f"![Ratio to the best peer]({name}.svg)"]
    for threads in counts(results):
        lines += ["", *_times(about, results, threads)]
    lines += ["", *_memory(results)]
    notes = _notes(results)
    return "\n".join([*lines, *(["", "## What did not run", "", *notes] if notes else [])]) + "\n"


def _times(about: Result, results: dict[str, Result], threads: str) -> list[str]:
    peak = about["limits"].get(threads, {}).get("gflops")
    lines = [
        f"## {threads} thread{'s' if threads != '1' else ''}",
        "",
        f"| model, milliseconds | optc | {' | '.join(PEERS.values())} | ratio | GFLOP/s | of peak | of float32 |",
        "|---|---|" + "---|" * len(PEERS) + "---|---|---|---|",
    ]
    for name, result in results.items():
        cells = [milliseconds(median(result, threads, "optc"))]
        for peer in PEERS:
            why = result["missing"].get(threads, {}).get(peer, "not run")
            found = median(result, threads, peer)
            cells.append(milliseconds(found) if found is not None else why.split(":")[0])
        gflops = speed(result, threads)
        int8 = result["kind"] == "int8"
        share = number(None if gflops is None or peak is None or int8 else gflops / peak, ".0%")
        cells += [number(ratio(result, threads)), number(gflops, ".0f"), share]
        cells.append(number(_gain(name, result, results, threads)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _gain(name: str, result: Result, results: dict[str, Result], threads: str) -> float | None:
    """Return how many times faster an int8 model is than its float32 form."""
    import cases

    float_case = results.get(cases.CASES[name].float_case)
    if float_case is None:
        return None
    slow, fast = median(float_case, threads, "optc"), median(result, threads, "optc")
    return slow / fast if slow and fast else None


def _memory(results: dict[str, Result]) -> list[str]:
    lines = [
        "## Memory and compile time",
        "",
        "Peak memory is that of a process that loads the model and runs it three times with one thread. *Bound* is the",
        "most that intermediate values alive at the same moment take: no plan needs less.",
        "",
        "| model | compile | peak memory: optc / onnxruntime, MB | weights | activations: plan / bound, MB |",
        "|---|---|---|---|---|",
    ]
    for name, result in results.items():
        memory = [megabytes(result["peak_memory"][n]) for n in ("optc", "onnxruntime")]
        plan = result["memory_report"]
        planned = f"{plan['planned'] / 1e6:.2f} / {plan['bound'] / 1e6:.2f}" if plan.get("planned") else "by size"
        cells = [name, f"{result['compile']:.1f} s", " / ".join(memory), megabytes(result["weights"]), planned]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _notes(results: dict[str, Result]) -> list[str]:
    notes = {}
    for name, result in results.items():
        for missing in result["missing"].values():
            for peer, why in missing.items():
                if why.startswith("fails"):
                    notes[f"* {name}, {PEERS[peer]}: {why.removeprefix('fails: ')}"] = None
    return list(notes)


ROW, LEFT, WIDTH = 22, 230, 720


def drawing(results: dict[str, Result]) -> bytes:
    """Return an SVG of bars: the ratio to the best peer of each model and thread count, with a line at 1."""
    threads = counts(results)
    bars = [(name, t, r) for name, result in results.items() for t in threads if (r := ratio(result, t)) is not None]
    most = max([1.0, *(r for _, _, r in bars)]) * 1.1
    scale = (WIDTH - LEFT - 50) / most
    height = ROW * len(bars) // max(1, len(threads)) * len(threads) + 40
    svg = Xml.Element(
        "svg", xmlns="http://www.w3.org/2000/svg", width=str(WIDTH), height=str(height), viewBox=f"0 0 {WIDTH} {height}"
    )
    Xml.SubElement(svg, "rect", width="100%", height="100%", fill="white")
    Xml.SubElement(svg, "style").text = "text { font: 12px sans-serif; fill: #222 }"
    for row, (name, count, value) in enumerate(bars):
        y = 10 + row * ROW
        if row % len(threads) == 0:
            _text(svg, name, LEFT - 8, y + 14, "end")
        colour = "#2b7a4b" if value >= 1 else "#b5482a"
        shade = {"fill": colour, "fill-opacity": "1" if count == threads[0] else "0.6"}
        Xml.SubElement(svg, "rect", x=str(LEFT), y=str(y), width=f"{value * scale:.1f}", height=str(ROW - 4), **shade)
        label = f"{value:.2f}, {count} thread{'s' if count != '1' else ''}"
        _text(svg, label, LEFT + value * scale + 4, y + 14, "start")
    x = f"{LEFT + scale:.1f}"
    Xml.SubElement(svg, "line", x1=x, x2=x, y1="4", y2=str(height - 26), stroke="#222")
    _text(svg, "best peer = 1", LEFT + scale, height - 10, "middle")
    return Xml.tostring(svg, encoding="utf-8") + b"\n"


def _text(svg: Xml.Element, text: str, x: float, y: float, anchor: str) -> None:
    Xml.SubElement(svg, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}).text = text

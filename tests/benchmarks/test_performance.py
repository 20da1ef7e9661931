"""The tools of the performance page: what a number is computed from, and what the page says where there is none."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))
import report

ABOUT = {
    "description": {
        "cpu": "CPU",
        "llvm": "cpu",
        "features": ["fma"],
        "cores": 2,
        "caches": {"L1": "32K"},
        "memory_gb": 8,
        "system": "Linux",
    },
    "limits": {t: {"gflops": 100.0 * int(t), "bandwidth": 20.0} for t in ("1", "2")},
}


def result(ours, theirs, kind="float32", **changes):
    return {
        "kind": kind,
        "flops": 1_000_000_000,
        "compile": 3.0,
        "weights": 5_000_000,
        "memory_report": {},
        "peak_memory": {"optc": 50_000_000, "onnxruntime": None},
        "times": {t: {"optc": {"median_ms": ours}, "openvino": {"median_ms": theirs}} for t in ("1", "2")},
        "missing": {"1": {"tvm": "fails: no such operator"}, "2": {}},
        **changes,
    }


def test_ratios_are_against_the_fastest_peer():
    one = result(10.0, 12.0)
    one["times"]["1"]["torch"] = {"median_ms": 8.0}
    assert report.ratio(one, "1") == pytest.approx(0.8)
    assert report.ratio(one, "2") == pytest.approx(1.2)
    assert report.speed(one, "1") == pytest.approx(100.0)
    assert report.mean_ratio({"a": one, "b": result(1.0, 5.0), "c": result(1.0, 9.0, "int8")}, "float32", "1") == 2.0


def test_the_page_names_what_is_missing():
    results = {"ResNet-50": result(10.0, 12.0), "ResNet-50 int8": result(5.0, 9.0, "int8")}
    page = report.page("here", ABOUT, results)
    assert "| ResNet-50 | 10.0 | not run | 12.0 | not run | not run | fails | 1.20 | 100 | 100% | – |" in page
    assert "| ResNet-50 int8 | 5.00 | not run | 9.00 | not run | not run | fails | 1.80 | 200 | – | 2.00 |" in page
    assert "* ResNet-50, TVM: no such operator" in page
    assert "| ResNet-50 | 3.0 s | 50 / – | 5 | by size |" in page


def test_the_drawing_has_a_bar_per_model_and_thread_count():
    drawing = ElementTree.fromstring(report.drawing({"a": result(10.0, 12.0), "b": result(2.0, 1.0)}))
    bars = [r for r in drawing.iter("{http://www.w3.org/2000/svg}rect") if r.get("fill") != "white"]
    assert len(bars) == 4
    assert float(bars[0].get("width")) > float(bars[2].get("width"))
    assert {t.text for t in drawing.iter("{http://www.w3.org/2000/svg}text")} >= {"a", "b", "best peer = 1"}

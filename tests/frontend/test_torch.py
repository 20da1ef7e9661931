"""Capture from PyTorch: modules, exported programs, factories, and what goes wrong with them."""

import subprocess
import sys

import pytest

from optc.errors import InvalidModelError, UnsupportedModelError, UsageError
from optc.ir import provenance
from optc.ir.serialize import to_proto

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from optc.frontend.torch import capture  # noqa: E402 - needs torch


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(torch.relu(self.linear(x)))


class Branching(torch.nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x + 1
        return x


X = torch.zeros(2, 4)


def ops(model):
    return [node.op_type for node in model.graph]


def test_a_module_is_captured_for_inference_and_left_as_it_was():
    module = Small().train()
    model = capture(module, example_inputs=(X,))
    assert "Dropout" not in ops(model)
    assert module.training
    assert module.dropout.training


def test_fx_node_names_are_the_provenance():
    model = capture(Small(), example_inputs=(X,))
    assert {source for node in model.graph for source in provenance.sources(node)} >= {"linear", "relu"}


def test_a_dynamic_dim_keeps_its_name():
    model = capture(Small(), example_inputs=(X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert [str(d) for d in model.graph.inputs[0].shape] == ["batch", "4"]
    assert str(model.graph.outputs[0].shape[0]) == "batch"


def test_programs_and_their_files(tmp_path):
    program = torch.export.export(Small().eval(), (X,))
    expected = ops(capture(program))
    torch.export.save(program, tmp_path / "m.pt2")
    assert ops(capture(tmp_path / "m.pt2")) == expected


def test_a_factory_by_name(tmp_path, monkeypatch):
    (tmp_path / "optc_test_factory.py").write_text(
        "import torch\ndef build(): return torch.nn.ReLU(), (torch.zeros(2, 3),)\nvalue = 3\n"
        "def alone(): return torch.nn.ReLU()\n"
    )
    monkeypatch.chdir(tmp_path)
    assert ops(capture("optc_test_factory:build")) == ["Relu"]
    with pytest.raises(UsageError, match="no 'missing'"):
        capture("optc_test_factory:missing")
    with pytest.raises(UsageError, match="needs example inputs"):
        capture("optc_test_factory:alone")
    with pytest.raises(UsageError, match="cannot import"):
        capture("optc_no_such_module:build")


def test_files_that_are_no_programs(tmp_path):
    (tmp_path / "m.pt2").write_bytes(b"rubbish")
    with pytest.raises(InvalidModelError, match=r"m\.pt2"):
        capture(tmp_path / "m.pt2")
    torch.save(Small().state_dict(), tmp_path / "m.pt")
    with pytest.raises(UsageError, match=r"only exported programs"):
        capture(tmp_path / "m.pt")


def test_data_dependent_control_flow_names_the_line():
    with pytest.raises(UnsupportedModelError, match=r"test_torch\.py.*line"):
        capture(Branching(), example_inputs=(torch.zeros(3),))


def test_without_torch_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import optc\n"
        "try: optc.capture('package.module:factory')\n"
        "except optc.OptcError as e: print(e.exit_code, e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("2 ")
    assert "pip install 'optc[torch]'" in done.stdout


class Keywords(torch.nn.Module):
    def forward(self, a, options):
        return a + options["shift"]


def test_inputs_by_keyword_and_mappings_as_inputs():
    options = {"shift": torch.ones(4)}
    by_position = capture(Keywords(), example_inputs=(X, options))
    by_keyword = capture(Keywords(), example_inputs={"a": X, "options": options})
    for model in (by_position, by_keyword):
        assert [value.name for value in model.graph.inputs] == ["a", "options_shift"]


class Statistics(torch.nn.Module):
    def forward(self, x):
        even, place = x.median(1, keepdim=True)
        return even, place, x.median(-2)[0], x.cumprod(-1)


def test_operators_that_the_exporter_lacks():
    onnxruntime = pytest.importorskip("onnxruntime")
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    model = capture(Statistics(), example_inputs=(x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    session = onnxruntime.InferenceSession(to_proto(model).SerializeToString())
    found = session.run(None, {"x": x[:2].numpy()})
    for a, b in zip(found, Statistics()(x[:2]), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b)


class Unknown(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.rrelu(x) + torch.linalg.matrix_exp(x)


def test_an_operator_without_translation_is_named():
    with pytest.raises(UnsupportedModelError, match=r"aten\.\w+.*No ONNX function"):
        capture(Unknown(), example_inputs=(torch.ones(4, 4),))

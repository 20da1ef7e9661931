import pytest

from optc.config import CompileConfig, read, write
from optc.errors import UsageError


def test_what_is_written_reads_back(tmp_path):
    config = CompileConfig(
        model="m.onnx",
        output="m.optc",
        target="x86-64-v3",
        input_shapes={"x": [1, "n", 4]},
        dims={"batch": 8},
        verify=False,
        tolerance=1e-3,
        disable_passes=["cse"],
    )
    write(tmp_path / "optc.toml", config)
    found = read(tmp_path / "optc.toml")
    assert found.model == str(tmp_path / "m.onnx")
    assert found.output == str(tmp_path / "m.optc")
    found.model, found.output = "m.onnx", "m.optc"
    assert found == config


def test_an_existing_file_is_kept(tmp_path):
    path = tmp_path / "optc.toml"
    path.write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        write(path, CompileConfig())
    assert path.read_text() == "precious"


def test_a_factory_is_no_path(tmp_path):
    (tmp_path / "optc.toml").write_text('[compile]\nmodel = "package.models:build"\n')
    assert read(tmp_path / "optc.toml").model == "package.models:build"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[compile", "not valid TOML"),
        ("[tune]\n", "unknown table tune"),
        ("[compile]\nmodle = 'x'\n", "unknown key compile.modle"),
        ("[compile]\nverify = 1\n", "wrong type"),
        ("[compile]\ntolerance = true\n", "wrong type"),
        ("[compile]\ndims = [1]\n", "wrong type"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "optc.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read(path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        read(tmp_path / "none.toml")

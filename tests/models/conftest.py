import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = Path(os.environ.get("OPTC_MODEL_CACHE", ROOT / ".cache" / "models"))


@pytest.fixture(scope="session")
def model_path():
    """A function: the path of a cached real model, or a skip that says how to get it."""

    def find(name: str) -> Path:
        path = CACHE / name
        if not path.exists():
            pytest.skip(f"{path} is missing; scripts/fetch_models.py and scripts/export_models.py make it")
        return path

    return find


@pytest.fixture(scope="session")
def compiled(model_path, tmp_path_factory):
    """A function: a cached real model compiled, saved and loaded again, once per session."""
    import optc

    folder = tmp_path_factory.mktemp("artifacts")

    @cache
    def build(name: str):
        file = folder / (name.replace("/", "_") + ".optc")
        optc.compile(model_path(name), verify=False).save(file)
        return optc.load(file)

    return build


@pytest.fixture(scope="session")
def reference(model_path):
    """A function: an onnxruntime session of a cached real model, as a function of the inputs."""
    import onnxruntime

    @cache
    def open_session(name: str):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(model_path(name), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda inputs: dict(zip(names, session.run(None, inputs), strict=True))

    return open_session


@pytest.fixture(scope="session")
def relative_error():
    """A function: the largest difference over the reference's largest magnitude."""

    def error(found: np.ndarray, expected: np.ndarray) -> float:
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        assert np.isfinite(expected).all()
        return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())

    return error

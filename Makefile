PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))

# JAX compilation dominates the tests: keep what was compiled. Threaded LAPACK would fight with the
# two test workers for cores.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.2
export OPENBLAS_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test lint types unit doctest notebooks clean

quickstart: $(VENV)/notebooks.stamp
	$(BIN)/python scripts/run_notebook.py notebooks/quickstart.ipynb

test: lint types unit doctest notebooks

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/test.stamp
	$(BIN)/mypy

unit: $(VENV)/test.stamp
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -n 2 tests

doctest: $(VENV)/test.stamp
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -n 2 --doctest-modules natgrad_jax

notebooks: $(VENV)/test.stamp
	JAX_PLATFORMS=cpu $(BIN)/python scripts/run_notebook.py $(NOTEBOOKS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/%.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e ".[$*]"
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .cache build dist

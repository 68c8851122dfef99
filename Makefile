# `make demo` and `make test` set up all they need in .venv; nothing else has to be typed.
PYTHON ?= python3
BIN := .venv/bin
SET_UP := .venv/.set-up
# Where pip has to be told of PyTorch's CPU builds: make demo PIP_FLAGS='--extra-index-url ...'
PIP_FLAGS ?=
# More for pytest: make test PYTEST_FLAGS='--durations=20'
PYTEST_FLAGS ?=

.PHONY: demo test test-all lint typecheck clean

demo: $(SET_UP)
	$(BIN)/srlm run launch/configs/toy_cpu.yaml

# One worker per core of a small machine; a file's tests share their launches, so they stay together.
test: $(SET_UP) lint typecheck
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not extra" $(PYTEST_FLAGS)

# And what takes too long for every change: independent oracles, compiled kernels, a second environment.
test-all: $(SET_UP) lint typecheck
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile $(PYTEST_FLAGS)

lint: $(SET_UP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(SET_UP)
	$(BIN)/mypy

# torch first and by its exact version, so that no other package's range chooses a larger build.
$(SET_UP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "srlm needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev]'
	touch $(SET_UP)

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

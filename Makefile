# Everything a newcomer needs: `make demo` and `make test`. Both set up their own virtual environment.

PYTHON ?= python3
VENV ?= .venv
TORCH := 2.13.0
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Where it is set, each of a thousand processes would compile its libraries again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint types imports unit server-real faults lock clean

help:  ## Show these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

setup: $(VENV)/.ready  ## Virtual environment with locked dependencies (CPU)

# The CPU build of torch is on PyTorch's own index; a machine that has it by another way finds it first. Not compiled: of
# so many files few are ever imported, and those are compiled then.
$(VENV)/.ready: requirements/cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ard-serve needs Python 3.11 or newer; run: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile "torch==$(TORCH)+cpu" 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet --no-compile "torch==$(TORCH)" --index-url https://download.pytorch.org/whl/cpu
	$(BIN)/python -m pip install --quiet --no-compile --progress-bar on --no-deps -r requirements/cpu.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

demo: setup  ## Restore a real small model, evaluate, export, serve and load-test it (15 minutes on 2 cores)
	$(BIN)/python examples/demo.py

test: lint types imports unit  ## Everything CI runs (20 minutes on 2 cores)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

# Two files at a time: most of a test's time is one process starting. What is held to a clock runs afterwards, alone.
unit: setup
	$(BIN)/python -m pytest -m "not slow and not gpu and not timing" --numprocesses 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m "timing and not slow and not gpu"

test-slow: setup  ## The long checks that CI leaves out
	$(BIN)/python -m pytest -m "slow and not gpu"

server-real: setup  ## The server's fault rows on a real vLLM on this machine, for the record (6 to 11 minutes)
	$(BIN)/python tests/real_faults.py docs/results/server-faults-cpu.json

faults: setup  ## The fault matrix: each row, its test and its outcome
	$(BIN)/python scripts/faults.py

lock: setup  ## Resolve requirements/cpu.lock again
	$(BIN)/python scripts/lock_cpu.py

clean:  ## Remove the virtual environment and the demo's files
	rm -rf $(VENV) demo

# Needs Python >= 3.11 and make, nothing else. `make` alone lists what there is.
#
# PYTHON=/path/to/python3 chooses the interpreter; ARGS="..." is added to the command that a target runs:
#     make train ARGS="--config.optimizer.learning_rate=1e-3"       make test ARGS="tests/core -x"

.DEFAULT_GOAL := help
SHELL := /bin/sh
CONFIG := configs/lm/stdlib.py
UV := uv
ARGS :=

# `python -m`, not the console scripts: those hold the path of the environment. All paths here are relative.
python := .venv/bin/python

# What was set for another Python does not reach this one.
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONOPTIMIZE PYTHONSAFEPATH PYTHONWARNINGS PYTHONINSPECT PYTHONPLATLIBDIR
# Bytecode is kept: without it every process compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONNOUSERSITE := 1

# The home folder may be read-only or missing: what libraries keep goes into the environment.
cache := $(CURDIR)/.venv/cache
export MPLCONFIGDIR := $(cache)/matplotlib
export IPYTHONDIR := $(cache)/ipython
export JUPYTER_CONFIG_DIR := $(cache)/jupyter/config
export JUPYTER_DATA_DIR := $(cache)/jupyter/data
export JUPYTER_RUNTIME_DIR := $(cache)/jupyter/runtime

.PHONY: help setup train test coverage slow lint aot lock clean

help:
	@echo "make train           train a language model on Python's own library, and compare it with gzip, bz2 and xz (4 minutes)"
	@echo "make train CONFIG=c  train another config"
	@echo "make test            run the test suite"
	@echo "make coverage        the same, and which lines it ran (a third slower)"
	@echo "make slow            run what is too slow for make test"
	@echo "make lint            ruff and mypy"
	@echo "make aot             compile every kernel for TPUs and GPUs that are not here (ARGS=--quick, or ARGS='--targets v6e,H100')"
	@echo "make setup           only make .venv, which the targets above do by themselves"
	@echo "make .venv-peers     an environment with torch beside ours, for benchmarks"
	@echo "make .venv-tpu       one with the TPU compiler; make .venv-cuda: with the CUDA compilers (Linux on x86-64)"
	@echo "make lock            resolve requirements/lock.txt anew (needs uv; ARGS=--upgrade for newer versions)"
	@echo "make clean           remove the environments and what tools left behind; runs/ stays"

setup:
	@scripts/setup

# .venv-NAME: the lock and requirements/NAME.txt
.PHONY: .venv-peers .venv-tpu .venv-cuda
.venv-peers .venv-tpu .venv-cuda:
	@scripts/setup $(@:.venv-%=%)

train: setup
	$(python) -m research.train --config $(CONFIG) $(ARGS)

# Two workers, since tests mostly wait for XLA's compiler, which uses one core; a file's tests stay together and share what is
# compiled.
test: setup
	$(python) -m pytest -n 2 --dist loadfile $(ARGS)

coverage: setup
	$(python) -m pytest -n 2 --dist loadfile --cov --cov-report=term $(ARGS)

# Two workers, then one: processes that wait for each other want the cores for them. 5 is "no such tests".
slow: setup
	@$(python) -m pytest -m "slow and not alone" -n 2 --dist loadfile --timeout=1800 --durations=25 $(ARGS); first=$$?; \
	if [ $$first -ne 0 ] && [ $$first -ne 5 ]; then exit $$first; fi; \
	$(python) -m pytest -m "slow and alone" --timeout=1800 --durations=25 $(ARGS); second=$$?; \
	if [ $$second -eq 5 ]; then exit $$first; fi; \
	exit $$second

lint: setup
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

# The two halves are compiled in environments of their own, by processes that this one starts.
aot: .venv-tpu .venv-cuda
	@.venv-tpu/bin/python -m pallas_kernels.aot $(ARGS)

lock:
	@command -v $(UV) >/dev/null || { echo "make lock needs uv: python -m pip install uv, or make lock UV=/path/to/uv" >&2; exit 1; }
	@{ \
	    echo "# Every package that make train, test and lint need, by version and hash, for Python 3.11 to 3.13 on Linux and macOS."; \
	    echo "# Made by: make lock"; \
	} > requirements/lock.head
	@cp requirements/lock.txt requirements/lock.new 2>/dev/null || true
	$(UV) pip compile pyproject.toml --extra text --extra slurm --extra test --extra dev --constraint requirements/constraints.in \
	    --universal --python-version 3.11 --fork-strategy fewest --generate-hashes --no-header --no-annotate --no-config --quiet \
	    --output-file requirements/lock.new $(ARGS) >/dev/null
	@cat requirements/lock.head requirements/lock.new > requirements/lock.txt
	@rm -f requirements/lock.head requirements/lock.new

clean:
	rm -rf .venv .venv-* .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

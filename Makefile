# Every target makes what it needs from nothing but make and a Python >= 3.11:
# the environment lives in .venv, and one stamp per extra says what is in it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Workers of pytest; `make test WORKERS=8` on a large machine (a few GB of memory each).
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean
.NOTPARALLEL:

help:
	@echo "make demo    train SGD, AdaGrad, Adam and Path-SGD from both starts (digits, about a minute)"
	@echo "make test    run the tests and the doctests (PYTEST_ARGS='-m slow' for the long ones)"
	@echo "make lint    ruff and mypy"
	@echo "make bench   step time of Path-SGD; cost of kappa on ResNet-18/50; ranks"
	@echo "make clean   remove the environment, caches and build output"

$(VENV)/.stamp-python:
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "error: no '$(PYTHON)' on PATH; install Python >= 3.11 or run 'make $(MAKECMDGOALS) PYTHON=/path/to/python'" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: jaxinv needs Python >= 3.11, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1); run 'make $(MAKECMDGOALS) PYTHON=python3.12'" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: '$(PYTHON)' cannot make virtual environments (Debian and Ubuntu: install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

# `make .venv/.stamp-test` installs jaxinv in place together with the extra "test".
$(VENV)/.stamp-%: $(VENV)/.stamp-python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

demo: $(VENV)/.stamp-cli
	$(BIN)/jaxinv reproduce path-sgd $(DEMO_ARGS)

# A file stays on one worker, so that what its tests share is trained and compiled once.
test: $(VENV)/.stamp-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.stamp-cli
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/kappa_resnet.py
	$(BIN)/python benchmarks/ranks.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis jaxinv-results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

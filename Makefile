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
.PHONY: help demo test lint docs bench clean api package test-minimal test-newest
.NOTPARALLEL:

help:
	@echo "make demo    train SGD, AdaGrad, Adam and Path-SGD from both starts (digits, about a minute)"
	@echo "make test    run the tests and the doctests (PYTEST_ARGS='-m slow' for the long ones)"
	@echo "make lint    ruff and mypy"
	@echo "make docs    build the documentation in build/site, executing the notebooks"
	@echo "make bench   step time of Path-SGD; cost of kappa on ResNet-18/50; ranks; growth; peers (with torch)"
	@echo "make api     record the public interface in tests/api.txt after a change that is meant"
	@echo "make package build wheel and sdist, install each in an environment of its own and try it"
	@echo "make test-minimal, test-newest   core tests with the oldest and newest dependencies"
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
	$(BIN)/mypy tests/typed_client.py

api: $(VENV)/.stamp-test
	$(BIN)/python -m tests.api

# Each is installed and tried in an environment of its own, from outside the checkout.
package: $(VENV)/.stamp-dev
	rm -rf dist build/package
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m tests.archives dist
	set -e; for file in dist/*.whl dist/*.tar.gz; do \
	  rm -rf build/package && $(PYTHON) -m venv build/package && \
	  build/package/bin/python -m pip install --quiet $$file && \
	  mkdir -p build/empty && cp tests/smoke.py build/empty/ && \
	  (cd build/empty && JAX_PLATFORMS=cpu ../package/bin/python smoke.py); \
	done

# What the core of the package promises; extras and experiments follow the newest versions alone.
CORE_TESTS := $(addprefix tests/,test_layout.py paths/test_norms.py _interpreter/test_walk.py \
  rescaling/test_group.py ranks/test_rank.py \
  jacobians/test_jacobians.py optimizers/test_path_kappa.py \
  rescaling/test_gauges.py test_invalid_inputs.py)
NEWEST_PYTHON ?= $(PYTHON)

test-minimal:
	$(PYTHON) -m venv build/minimal
	build/minimal/bin/python -m pip install --quiet --constraint requirements/minimal.txt . \
	  pytest hypothesis equinox dm-haiku
	build/minimal/bin/python -m pytest $(CORE_TESTS) -W "ignore:jax.core:DeprecationWarning"

test-newest:
	$(NEWEST_PYTHON) -m venv build/newest
	build/newest/bin/python -m pip install --quiet --upgrade . pytest hypothesis equinox dm-haiku
	build/newest/bin/python -m pytest $(CORE_TESTS)

# mkdocs-material announces its successor at every build unless told not to.
docs: $(VENV)/.stamp-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.stamp-bench
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/data_dependent.py
	$(BIN)/python benchmarks/symmetries.py
	$(BIN)/python benchmarks/kappa_resnet.py
	$(BIN)/python benchmarks/ranks.py
	$(BIN)/python benchmarks/functional_dimension.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/large_models.py
	$(BIN)/python benchmarks/first_calls.py
	$(BIN)/python benchmarks/peers.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis jaxinv-results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

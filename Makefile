# SPDX-License-Identifier: Apache-2.0
# Every target does its own set-up. See `make help`.
#
# Without PYTHON, the targets run in an environment of their own (VENV), made by tools/bootstrap.py.
# With PYTHON, `gpu-test`, `gpu-bench`, `build` and `lint` run in that Python as it is, and for the
# others it is the Python that VENV is made with.

VENV ?= .venv
ARGS ?=
BASE_PYTHON := $(or $(PYTHON),python3)
VENV_PYTHON := env -u PYTHONPATH -u PYTHONHOME $(VENV)/bin/python

ifeq ($(PYTHON),)
  RUN := $(VENV_PYTHON)
  READY := setup
else
  RUN := PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)
  READY := in-place
endif

.PHONY: help setup in-place build demo test gpu-test gpu-bench lint clean

help:
	@echo "make demo       the main job on a real protein; sets up .venv first (once, up to half an hour)"
	@echo "make test       the tests that need no GPU; sets up .venv first"
	@echo "make gpu-test   the tests that need a GPU"
	@echo "make gpu-bench  the benchmarks"
	@echo "make build      the C++ extension, in place"
	@echo "make lint       black, and clang-format where it is installed"
	@echo "make clean      removes .venv and everything built"
	@echo
	@echo "ARGS='...'      further arguments, such as: make test ARGS='-k plan -x', or ARGS='-n 0 --pdb' for one process"
	@echo "VENV=folder     the environment, .venv unless given"
	@echo "PYTHON=python   for gpu-test, gpu-bench, build, lint: use this Python as it is; it has torch"
	@echo "                and Transformer Engine. For demo and test: make the environment with it."

setup:
	@$(BASE_PYTHON) tools/bootstrap.py --venv "$(VENV)" $(if $(PYTHON),--with-this-python)

in-place:
	@$(RUN) tools/build_extension.py

build: $(READY)

demo: setup
	$(VENV_PYTHON) examples/demo.py $(ARGS)

test: setup
	$(VENV_PYTHON) -m pytest tests --ignore=tests/gpu -n auto --maxprocesses 8 --dist loadfile $(ARGS)

gpu-test: $(READY)
	$(RUN) -m pytest tests/gpu $(ARGS)

gpu-bench: $(READY)
	$(RUN) benchmarks/run.py $(ARGS)

lint: $(if $(PYTHON),,setup)
	$(RUN) -m black --check .
	@if command -v clang-format >/dev/null; then \
	  clang-format --dry-run --Werror csrc/*.cpp csrc/*.h; \
	else echo "clang-format is not installed: the C++ files were not checked"; fi

clean:
	rm -rf "$(VENV)" build dist *.egg-info transformer_engine_batched/*.so
	find . -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

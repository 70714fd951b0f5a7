# Every command sets up what it needs in $(VENV) first. `make test VENV=` runs in the environment at
# hand instead: the extension is compiled in place and nothing is downloaded or installed.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
EXTRAS ?= bench,test
ARGS ?=
RESULTS := $(or $(OUT),benchmarks/results)

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
endif
need = $(if $(strip $(VENV)),$(VENV)/.has-$(subst $(comma),-,$(1)))
comma := ,
# Its package has no __main__ to run with -m.
clang_format = $(PY) -c 'import clang_format; clang_format.clang_format()'

cxx_files = $(wildcard csrc/*.* csrc/*/*.* tests/cuda_on_cpu/*.cpp tests/cuda_on_cpu/*.h)

compile = $(PY) setup.py -q build_ext --inplace

.PHONY: help compare test coverage test-cuda test-cuda-mutants sanitize build wheel lint format typecheck gpu memory docs clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  VENV=            run in the current environment, installing nothing (default VENV=.venv)"
	@echo "  ARGS='...'       arguments for compare.py or pytest: make compare ARGS='--quick'"
	@echo "  PYTHON, TORCH    interpreter and torch to set up with: make test TORCH=torch==2.13.0"
	@echo "  USE_CUDA=0/1 TORCH_CUDA_ARCH_LIST MAX_JOBS DEBUG=1    what is compiled, and how"

compare: $(call need,bench) ## compare with torch's optimizers, on the GPU if there is one
	@$(PY) benchmarks/check.py
	$(compile)
	$(PY) benchmarks/compare.py $(ARGS)

test: build ## run the tests and the examples in the docstrings
	$(PY) -m pytest $(ARGS)

coverage: build ## run the tests and print which share of src/torch_freeze they run
	$(PY) -m pytest --cov=torch_freeze --cov-report=term $(ARGS)

test-cuda: build ## run the GPU tests on simulated CUDA, without a GPU, in several orders of its streams
	$(PY) tests/cuda_on_cpu/run.py $(ARGS)

test-cuda-mutants: build ## plant faults in the CUDA code, each of which the tests of test-cuda have to notice
	$(PY) tests/cuda_on_cpu/mutants.py $(ARGS)

sanitize: $(call need,$(EXTRAS)) ## tests under ASan, UBSan and TSan, with a C++ compiled for them
	PYTHON=$(PY) tests/sanitize.sh address
	PYTHON=$(PY) tests/sanitize.sh thread

build: $(call need,$(EXTRAS)) ## compile the extension in place; only what changed
	$(compile)

# Repaired: tagged with the oldest glibc it runs on. What comes with torch stays out of it. auditwheel
# looks for patchelf on PATH.
wheel: $(call need,torch) $(call need,wheel) ## build a wheel for this torch, and no other, into dist/
	rm -rf build/wheel
	TORCH_FREEZE_PIN_TORCH=1 $(PY) -m pip wheel --no-build-isolation --no-deps -w build/wheel .
	PATH="$(abspath $(dir $(PY))):$$PATH" $(PY) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' \
	  --wheel-dir dist build/wheel/*.whl

lint: $(call need,lint) ## check the style of Python and C++
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(clang_format) --dry-run --Werror $(cxx_files)

format: $(call need,lint) ## bring Python and C++ into that style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(clang_format) -i $(cxx_files)

typecheck: $(call need,torch) $(call need,lint) ## check the types with mypy --strict
	$(PY) -m mypy

gpu: build ## GPU tests, compute-sanitizer and benchmark; results go to $OUT or benchmarks/results
	$(PY) -c 'import torch; torch.cuda.is_available() or exit("make gpu: torch finds no CUDA device")'
	$(PY) -m pytest -m gpu
	@packages=$$($(PY) -c 'import glob, sysconfig; \
	  print(*glob.glob(sysconfig.get_path("purelib") + "/nvidia/*/bin"), sep=":")'); \
	sanitizer=$$(PATH="$$PATH:$${CUDA_HOME:-/usr/local/cuda}/bin:$$packages" command -v compute-sanitizer) || \
	  { echo "make gpu: left out, for want of compute-sanitizer: memcheck, racecheck, initcheck" \
	    "(pip install 'cuda-toolkit[sanitizer]')"; exit 0; }; \
	for tool in memcheck racecheck initcheck; do \
	  "$$sanitizer" --tool $$tool --error-exitcode 1 $(PY) benchmarks/sanitize.py || exit 1; \
	done
	$(PY) benchmarks/compare.py --device cuda --suite speed,digits,targets --results $(RESULTS) $(ARGS)
	$(PY) benchmarks/compare.py --device cuda --suite speed,targets --optimizer adamw --results $(RESULTS) $(ARGS)

memory: build ## compare what training takes of memory; results go to $OUT or benchmarks/results
	$(PY) benchmarks/compare.py --suite memory --results $(RESULTS) $(ARGS)

docs: $(call need,docs) ## build the site from docs/ and the docstrings, into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

clean: ## remove what was built; the virtual environment stays
	rm -rf build dist site *.egg-info src/*.egg-info src/torch_freeze/*.so src/torch_freeze/_C.*.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

$(VENV)/.has-pip:
	$(PYTHON) -m venv --upgrade-deps $(VENV)
	touch $@

# The module is compiled against the torch in the environment, so torch comes first.
$(VENV)/.has-torch: | $(VENV)/.has-pip
	$(PY) -m pip install "$(TORCH)" "setuptools>=77" ninja
	touch $@

# Tools that look at files and run nothing of the package: no torch, nothing compiled.
$(VENV)/.has-docs $(VENV)/.has-lint $(VENV)/.has-wheel: pyproject.toml | $(VENV)/.has-pip
	$(PY) -m pip install --group $(@F:.has-%=%)
	touch $@

# Named again with the rest, torch stays what it is.
$(VENV)/.has-%: pyproject.toml | $(VENV)/.has-torch
	$(PY) -m pip install --no-build-isolation -e ".[$(subst -,$(comma),$*)]" "$(TORCH)"
	touch $@

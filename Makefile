# `make test` and `make demo` do their own set-up in .venv, from the pinned requirements, wherever pip is told to look.
# It runs again only when the requirements change. PYTHON picks the interpreter, 3.11 or later.

PYTHON ?= python3
# Test processes at a time; each takes about 2 GB.
JOBS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
READY := .venv/ready
TREE := build/tree

# The tree is laid out anew each time.
.PHONY: test check sweep gpu aot lint types demo bench setup clean $(TREE)

test: lint types
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --durations=15 -m "not sweep"

# Before each commit, in under four minutes on two cores: style, layers, types, and what one pass or one kernel does.
# Left out is what takes longest: programs drawn at random, encoders, key biases in whole models; of the kernels those in
# torch operations and in Triton, and of the others what draws many problems, differentiates or compiles C++ again.
CHECKED := tests/test_architecture.py tests/passes tests/kernels/common tests/kernels/reference tests/kernels/cpu
LONG := any_ or random or grammar or bidirectional or key_bias or equals_a_loop or derivatives or pair_of_features \
	or output_and_gradients or every_bit or compilers or builds or thousands

check: lint types
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "not sweep and not slow" -k "not ($(LONG))" $(CHECKED)

# What `make test` takes a part of: the other form of every architecture of transformers, SmolLM2's
# generation and gradients, the GPU kernels in bfloat16, and compiled for every chip and shape class
# (more than an hour on two cores).
sweep: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) -m sweep

# What needs a GPU; elsewhere each test says so.
gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

# Registers, spills, shared memory and matrix instructions of the GPU kernels; needs no GPU.
aot: $(READY)
	$(BIN)/python -m tests.support.aot --chips all --features plain,everything,dense,decode

# Style, and which folder may import which (pyproject.toml, [tool.importlinter]).
lint: $(READY) $(TREE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(TREE) && ../../$(BIN)/lint-imports --no-cache --no-logo ../../pyproject.toml

types: $(READY) $(TREE)
	cd $(TREE) && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache

# The package as it is installed, passes/ and kernels/ inside it, for what reads its imports. import-linter passes over
# a folder without an __init__.py, which neither has at the top of the repository.
$(TREE):
	@rm -rf $@ && mkdir -p $@/moonfx/passes $@/moonfx/kernels
	@touch $@/moonfx/passes/__init__.py $@/moonfx/kernels/__init__.py
	@ln -s $(CURDIR)/moonfx/* $@/moonfx && ln -s $(CURDIR)/passes/* $@/moonfx/passes
	@ln -s $(CURDIR)/kernels/* $@/moonfx/kernels

# The site in build/site, from docs/, README.md and CONTRIBUTING.md, with mkdocs in a virtual environment of its own.
# Strictly: a dead link, a page without a place or an undocumented public name fails.
.PHONY: docs
docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.venv-docs/ready: requirements-docs.txt
	$(PYTHON) -m venv --clear .venv-docs
	.venv-docs/bin/python -m pip install --disable-pip-version-check -r requirements-docs.txt
	@touch $@

demo: $(READY)
	$(BIN)/python examples/sparsify_smollm2.py

bench: $(READY)
	$(BIN)/moonfx bench attention

setup: $(READY)

# Some packages ask for more than is used of them: that file says of each what it is here for.
.venv/requirements: requirements.txt requirements-no-deps.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit( \
		"moonfx needs Python 3.11 or later, this is %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv --clear .venv
	$(PIP) -r requirements.txt
	$(PIP) --no-deps -r requirements-no-deps.txt
	@touch $@

$(READY): .venv/requirements pyproject.toml
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf .venv .venv-docs build

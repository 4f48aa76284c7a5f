# make demo        the whole job on the model and images shipped with the package
# make test        the tests
# make test-quick  the tests that are not marked slow
# make lint        style and types
# make docs        docs/reference.md, from the code
#
# Each creates .venv on first use, installs the tested versions and runs. A later call installs nothing
# unless pyproject.toml or constraints.txt changed.
#
#   PYTHON       the interpreter .venv is made with: 3.11 or newer
#   TORCH_INDEX  an extra step first: install torch from this index, e.g. the CPU builds of PyTorch at
#                https://download.pytorch.org/whl/cpu, which are far smaller than the default on x86 Linux
#   OUT          where `make demo` writes
#   TESTERS      how many processes run the tests: a number, or auto for one per core
#   TEST_EXTRAS  the extras installed for the tests: test,browser adds those that open pages in Chromium

PYTHON ?= python3
TORCH_INDEX ?=
OUT ?= build/demo
TESTERS ?= auto
TEST_EXTRAS ?= test

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
TORCH_PIN := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)

.PHONY: demo test test-quick lint docs clean

demo: $(STAMP)
	$(BIN)/mm-edge demo --out $(OUT)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(TESTERS) --dist loadfile

test-quick: $(STAMP)
	$(BIN)/python -m pytest -n $(TESTERS) --dist loadfile -m "not slow"

lint: $(DEV_STAMP)
	$(BIN)/ruff check mm_edge tests benchmarks
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m mm_edge.cli.reference > docs/reference.md

clean:
	rm -rf $(VENV) build

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "mm-edge needs Python 3.11 or newer; '$(PYTHON)' is older or absent: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# The stamp is written last, so that an interrupted install is done again.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(if $(TORCH_INDEX),$(PIP) $(TORCH_PIN) --index-url $(TORCH_INDEX))
	$(PIP) -e '.[$(TEST_EXTRAS)]'
	@touch $@

$(DEV_STAMP): $(STAMP)
	$(PIP) -e '.[$(TEST_EXTRAS),dev]'
	@touch $@

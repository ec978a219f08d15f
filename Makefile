# Each target sets up .venv by itself; nothing else is needed than Python >= 3.11.
#   make demo     install, pretrain on the built-in images, evaluate, draw demo.png, write report.html
#   make test     install with the developer tools, run the tests
#   make check    lint, formatting and types
#   make docs     build the documentation site into site/; warnings are errors
# PIP_FLAGS goes to pip: to choose a smaller CPU build of torch, say.

PYTHON ?= python3
PIP_FLAGS ?=
# worksteal keeps the tests of a file together, which share what they set up.
PYTEST_FLAGS ?= -q -n auto --dist worksteal

BIN := .venv/bin
# A new pyproject.toml asks for a new installation; the stamps carry its checksum.
HASH := $(shell cksum < pyproject.toml | tr ' ' '-')
RUNTIME := .venv/.foveola-$(HASH)
DEV := .venv/.foveola-dev-$(HASH)

DOCS := .venv/.foveola-docs-$(HASH)

.PHONY: demo test check docs

demo: $(RUNTIME)
	$(BIN)/foveola demo out=runs/demo

test: $(DEV)
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

check: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("foveola needs Python >= 3.11, not " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

$(RUNTIME): | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -e .
	touch $@

# One command, so that pip chooses a torch and a torchvision that belong together.
$(DEV): | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -e '.[dev]'
	touch $(RUNTIME) $@

$(DOCS): | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -e '.[docs]'
	touch $@

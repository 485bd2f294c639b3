# `make demo` and `make test` do all there is to do, from a fresh clone with Python (3.10 to 3.13) and make
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help demo test clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t12

# The stamps hold what was installed: a second run installs nothing, a change of requirements does it again
$(VENV)/.demo: settings.ini setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.dev: settings.ini setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo ## train on handwritten digits with Adam and with adam_jit, and compare
	$(BIN)/python -m tests.demo

test: $(VENV)/.dev ## run notebooks, tests, the demo in a small setting, and check that all is in step
	$(BIN)/python -m pytest tests -q

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info _docs _proc

# `make demo` and `make test` do all there is to do, from a fresh clone with Python (3.10 to 3.13) and make
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SHELL  := bash
export PATH := $(CURDIR)/$(BIN):$(PATH)
# what `time` prints after each part
export TIMEFORMAT := -- took %R s

.DEFAULT_GOAL := help
.PHONY: help demo test bench fuzz readme dist clean

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
	$(BIN)/python -m tests.tools.demo

test: $(VENV)/.dev ## run the notebooks and the tests: optimizers, the demo in a small setting, whether all is in step
	time OMP_NUM_THREADS=1 nbdev-test --timing
	time OMP_NUM_THREADS=1 python -m pytest tests -q -n 2 --dist worksteal --durations=10

bench: $(VENV)/.demo ## measure every optimizer beside fastai's and torch.optim's, some minutes
	$(BIN)/python -m fastxtend_jit.bench

fuzz: $(VENV)/.dev ## look for differences from fastai for longer: FASTXTEND_FUZZ=examples
	FASTXTEND_FUZZ=$${FASTXTEND_FUZZ:-2000} python -m pytest tests/test_fuzz.py -q

readme: $(VENV)/.dev ## write README.md from nbs/index.ipynb
	python -m tests.tools.readme

dist: $(VENV)/.dev ## build the packages for PyPI into dist/
	pip install --quiet build
	python -m build --quiet

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info _docs _proc

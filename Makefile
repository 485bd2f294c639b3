# `make demo` and `make test` do what there is to do, from a fresh clone with Python (3.10 to 3.14) and make
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SHELL  := bash
export PATH := $(CURDIR)/$(BIN):$(PATH)
# what `time` prints after each part
export TIMEFORMAT := -- took %R s

.DEFAULT_GOAL := help
.PHONY: help demo test slow test-all bench gpu fuzz readme dist clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t12

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

# Two processes with one thread each. Slow tests share what they run in processes of their own: each file stays in one
PYTEST := time OMP_NUM_THREADS=1 python -m pytest tests -q -n 2 --durations=10

test: $(VENV)/.dev ## run the notebooks, and the tests but for the slow ones: some minutes
	ruff check
	time OMP_NUM_THREADS=1 nbdev-test --timing
	$(PYTEST) --dist worksteal -m 'not slow'

slow: $(VENV)/.dev ## run the tests that take long, which `make test` leaves out
	$(PYTEST) --dist loadfile -m slow

test-all: test slow ## run everything: notebooks and all tests

bench: $(VENV)/.demo ## measure every optimizer beside fastai's and torch.optim's, some minutes
	$(BIN)/python -m fastxtend_jit.bench

gpu: $(VENV)/.dev ## check and measure all there is on an NVIDIA GPU, about eight minutes: nbs/performance/<card>/
	$(BIN)/python -m tests.gpu

fuzz: $(VENV)/.dev ## look for differences from fastai for longer: FASTXTEND_FUZZ=examples
	FASTXTEND_FUZZ=$${FASTXTEND_FUZZ:-2000} python -m pytest tests/test_fuzz.py -q -m slow

readme: $(VENV)/.dev ## write README.md from nbs/index.ipynb
	python -m tests.tools.readme

dist: $(VENV)/.dev ## build the packages for PyPI into dist/
	pip install --quiet build
	python -m build --quiet

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info _docs _proc

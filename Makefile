# minillm. `make` alone lists what there is. Needs only Python >= 3.11, make and git.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Extra arguments for every pip call: a mirror, or PyTorch's index for a machine without CUDA.
PIP_ARGS ?=
ARGS   ?=
C      ?= *
CHAPTERS := $(wildcard chapters/[0-9]*.ipynb)
export MPLBACKEND ?= agg
export PYDEVD_DISABLE_FILE_VALIDATION := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup speedrun test lab book text notebooks export execute check lint types unit nbval bench clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer, not {sys.version.split()[0]}"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt torch numpy
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $(READY)

setup: $(READY) ## create .venv with everything, at the tested versions

speedrun: $(READY) ## raw text -> a small bilingual model that talks (ARGS='--recipe small' for more)
	$(BIN)/minillm speedrun $(ARGS)

test: lint types check unit nbval ## everything: ruff, types, export check, unit tests, every chapter executed

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check minillm tests benchmarks book

types: $(READY)
	$(BIN)/basedpyright --level error

unit: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests $(ARGS)

nbval: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbval --nbval-sanitize-with tests/nbval.cfg \
	  --nbval-cell-timeout=300 -n 2 --dist loadfile --durations=5 $(CHAPTERS)

lab: $(READY) ## open the chapters in JupyterLab
	$(BIN)/jupyter lab chapters

book: $(READY) ## build the HTML book into book/_build/html
	$(BIN)/python -m sphinx -q -W --keep-going -b html book book/_build/html
	@echo "open book/_build/html/index.html"

text: $(READY) ## chapters/*.ipynb -> .text/*.py, for editing (C=05_norm for one)
	@mkdir -p .text
	@for n in chapters/$(C).ipynb; do $(BIN)/jupytext -q --to py:percent -o .text/$$(basename $$n .ipynb).py $$n; done

notebooks: $(READY) ## .text/*.py -> chapters/*.ipynb; cell ids and outputs are kept
	@for t in .text/$(C).py; do n=chapters/$$(basename $$t .py).ipynb; \
	  $(BIN)/jupytext -q --update --to notebook -o $$n $$t && $(BIN)/python book/notebook.py tidy $$n; done

export: $(READY) ## chapters -> minillm/*.py
	@$(BIN)/nbdev-export
	@$(BIN)/ruff check -q --fix --select I minillm
	@$(BIN)/ruff format -q minillm

execute: $(READY) ## run a chapter and store its outputs: make execute C=05_norm
	@for n in chapters/$(C).ipynb; do echo $$n; OMP_NUM_THREADS=1 $(BIN)/python book/notebook.py execute $$n || exit 1; done

check: $(READY) ## do text, notebooks and modules agree?
	@for t in $$(ls .text/$(C).py 2>/dev/null); do n=chapters/$$(basename $$t .py).ipynb; \
	  [ $$t -ot $$n ] || $(BIN)/jupytext -q --to py:percent -o - $$n | diff -q - $$t >/dev/null \
	  || echo "$$t is newer than $$n: run make notebooks"; done
	@$(BIN)/python -m pytest tests/test_house.py

bench: $(READY) ## beside the peers, quickly; writes data/results/
	$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove everything that was built
	rm -rf $(VENV) .text book/_build build dist

# Every target works on a fresh machine: it makes its own environment first.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# One environment for each version of Python; .venv is that of the default one.
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(VERSION))
BIN := $(VENV)/bin
# Of the notebook: which kernel runs it, and that tutorial.md gets no header if it is written back.
METADATA := {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}, \
	"jupytext": {"notebook_metadata_filter": "-all"}}

.DEFAULT_GOAL := help

help:  ## list what can be made
	@echo "make TARGET, where TARGET is:"
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

demo: $(VENV)/installed  ## ten lessons on futures; then a real program, while a worker is killed
	$(BIN)/python examples/ten_lessons.py
	$(BIN)/python examples/demo.py

test: $(VENV)/installed  ## run the tests (PYTHON=python3.12: with that Python)
	$(BIN)/python -m pytest

cover: $(VENV)/installed  ## branch coverage of the three minds, by the pure tests alone
	$(BIN)/coverage run --data-file=$(VENV)/coverage -m pytest -m pure
	$(BIN)/coverage report --data-file=$(VENV)/coverage

soak: $(VENV)/installed  ## the simulation fifty times, beside ten minutes of faults on real processes
	$(BIN)/python tests/soak.py

mutants: $(VENV)/installed  ## change lines of the minds, and see whether the pure tests notice
	$(BIN)/python tests/mutants.py

bench: $(VENV)/installed  ## time per task, beside concurrent.futures; and dask.distributed, if installed
	$(BIN)/python benchmarks/bench.py

notebook: $(VENV)/notebook  ## open the tutorial in JupyterLab, as tutorial.ipynb: yours to change
	[ -e tutorial.ipynb ] || $(BIN)/jupytext --quiet --to ipynb --update-metadata '$(METADATA)' tutorial.md
	$(BIN)/jupyter lab tutorial.ipynb

lint: $(VENV)/installed  ## check the formatting, and what ruff takes for a mistake
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

clean:  ## remove the environments and what was built
	rm -rf .venv .venv-* build *.egg-info __pycache__ */__pycache__ .hypothesis .ruff_cache

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

$(VENV)/notebook: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[notebook]'
	touch $@

.PHONY: help demo test soak cover mutants bench notebook lint clean

# Each target is complete from a fresh clone: it makes .venv where that is missing and installs what it needs.
PYTHON ?= python3
DIR ?=
BIN := .venv/bin
FULL := .venv/.full
CORE := .venv/.core

.PHONY: demo test slow check docs clean

demo: $(CORE)           ## index a folder of photos, search it, write a page (DIR=~/Pictures for your own)
	$(BIN)/python -m benchmarks.demo $(if $(DIR),"$(DIR)")

test: $(FULL)           ## every ordinary test
	$(BIN)/python -m pytest -q

slow: $(FULL)           ## the tests marked slow
	$(BIN)/python -m pytest -q -m slow

check: $(FULL)          ## style, types, the layers between packages, generated documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

docs: $(FULL)           ## write docs/cli.md anew from the commands' own help
	$(BIN)/python docs/generate.py

$(CORE): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e . scikit-image scikit-learn
	touch $@

$(FULL): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[torch,dev]'
	touch $@ $(CORE)

clean:                  ## remove what these targets made
	rm -rf .venv demo-out dist build

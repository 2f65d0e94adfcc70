# `make demo` and `make test` do all the set-up they need, into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint types bench setup clean

demo: $(INSTALLED)
	$(BIN)/stpath demo --out demo

test: $(INSTALLED)
	$(BIN)/pytest -n 2 --cov --cov-report=term:skip-covered

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(INSTALLED)
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/pytest benchmarks --benchmark-json=.benchmarks/latest.json

setup: $(INSTALLED)

# pip, with torch pinned: the bare name would fetch gigabytes of CUDA.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info .benchmarks

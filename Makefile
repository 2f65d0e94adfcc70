# `make demo` and `make test` do all the set-up they need, into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo demo-checkpoint test lint types bench setup clean

demo: $(INSTALLED)
	$(BIN)/stpath demo --out demo

# Trains what the demo shows anew; the package carries the file that it prints.
demo-checkpoint: $(INSTALLED)
	$(BIN)/python -m stpath_train.demo_checkpoint demo-checkpoint

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

# pip, with torch pinned: the bare name would fetch gigabytes of CUDA. torchvision's wheels are built for CUDA and do not
# load beside a PyTorch for the CPU unless the tests help (tests/conftest.py), so only the tests of features see it.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps --target $(VENV)/features timm torchvision
	touch $@

clean:
	rm -rf $(VENV) demo demo-checkpoint build *.egg-info .benchmarks

# `make demo` and `make test` do all the set-up they need, into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TRITON := $(VENV)/triton
LAZYSLIDE := $(VENV)/lazyslide
LOWEST := $(abspath $(VENV)/lowest)

.PHONY: demo demo-checkpoint test test-lowest test-soak test-docs test-triton test-lazyslide test-view docs lint types bench bench-quick dist setup clean

demo: $(INSTALLED)
	$(BIN)/stpath demo --out demo

# Trains what the demo shows anew; the package carries the file that it prints.
demo-checkpoint: $(INSTALLED)
	$(BIN)/python -m stpath_train.demo_checkpoint demo-checkpoint

# One thread for each of the two processes: with more they wait for each other. A file of tests stays in one process, so
# that graphs that its exports share are traced once.
test: $(INSTALLED)
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --skip-covered
	@printf 'stpath_runtime alone, in percent: '
	@$(BIN)/coverage report --include='stpath_runtime/*' --format=total --fail-under=90

# The runtime with the lowest versions that pyproject.toml allows of what it needs, laid over those of all the rest.
test-lowest: $(LOWEST)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=$(LOWEST) $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder tests/runtime

# The same faults many more times: mutated files, and runs that are killed.
test-soak: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m soak

# Every command and code block of README and docs/, and the notebook.
test-docs: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m docs tests/docs

# The site, in docs/_build; a warning is an error.
docs: $(INSTALLED)
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

# Slides from a real Triton server.
test-triton: $(TRITON)/.installed
	$(BIN)/pytest -n 0 -m triton tests/triton_server

# Engines within LazySlide, and predictions in squidpy.
test-lazyslide: $(LAZYSLIDE)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 0 -m lazyslide tests/lazyslide

# The viewer's page in Chromium, which Debian's package manager installs.
test-view: $(VENV)/.browser
	$(BIN)/pytest -n 0 -m view tests/runtime/viewer

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(INSTALLED)
	$(BIN)/mypy

# Alone on the machine: all, which takes long, or the key rows, in 7 minutes on 2 cores.
bench: $(INSTALLED)
	$(BIN)/pytest benchmarks --benchmark-quiet --benchmark-json=.benchmarks/pytest-benchmark.json

bench-quick: $(INSTALLED)
	$(BIN)/pytest benchmarks --quick --benchmark-quiet

# Source and wheel for a release, in dist.
dist: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

setup: $(INSTALLED)

# pip, with torch pinned: the bare name would fetch gigabytes of CUDA. torchvision's wheels are built for CUDA and do not
# load beside a PyTorch for the CPU unless the tests help (tests/conftest.py), so only the tests of features see it.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps --target $(VENV)/features timm torchvision
	touch $@

$(VENV)/.browser: $(INSTALLED)
	command -v chromium > /dev/null || (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium)
	$(BIN)/pip install -q -c constraints.txt playwright
	touch $@

# pip says of the other packages there that they want newer ones.
$(LOWEST)/.installed: $(INSTALLED) tests/lowest.py
	rm -rf $(LOWEST)
	$(BIN)/python tests/lowest.py > $(VENV)/lowest.txt
	$(BIN)/pip install -q --only-binary :all: --target $(LOWEST) -r $(VENV)/lowest.txt
	touch $@

# nvidia-pytriton carries a Triton server without a GPU's needs, whose Python backend takes the system's Python 3.11 (it
# links libpython3.11.so) and numpy < 2: an environment of its own, otherwise with the versions that the tests run with.
$(TRITON)/.installed: $(INSTALLED)
	/usr/bin/python3.11 -m venv $(TRITON)
	grep -v -e ^numpy= -e ^zarr= constraints.txt > $(TRITON)/constraints.txt
	$(BIN)/python tests/lowest.py --all-but-numpy > $(TRITON)/needs.txt
	$(TRITON)/bin/pip install -q -c $(TRITON)/constraints.txt 'numpy<2' nvidia-pytriton==0.7.0 \
		'tritonclient[http,grpc]==2.73.0' -r $(TRITON)/needs.txt
	$(TRITON)/bin/pip install -q --no-deps -e .
	cd $(TRITON)/lib/python3.11/site-packages/pytriton/tritonserver && \
		cp python_backend_stubs/3.11/triton_python_backend_stub backends/python
	touch $@

# LazySlide needs versions of its own of much that the tests have.
$(LAZYSLIDE)/.installed: $(INSTALLED)
	$(PYTHON) -m venv $(LAZYSLIDE)
	$(LAZYSLIDE)/bin/pip install -q -c constraints.txt lazyslide==0.13.0 lazyslide-models==0.1.0 squidpy==1.8.2 -e '.[cpu,wsi]'
	touch $@

clean:
	rm -rf $(VENV) demo demo-checkpoint build dist docs/_build *.egg-info .benchmarks

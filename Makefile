# `make demo` and `make test` are all a fresh clone needs: each makes .venv and installs what it uses.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SHELL := bash
# What the tests need, as `pip install` takes it.
EXTRAS := .[scann,torch,plot,ray,sweep,serve,docs,dev]
# Environments of their own, which nothing else uses.
AUDIT := .venv-audit
LATEST := .venv-latest

.PHONY: demo test test-slow test-latest lint format docs audit constraints venv clean

demo: venv  ## the quick start: synthetic log in, recommender and report out
	$(BIN)/python experiments/launch.py

test: venv  ## the test suite, on two cores
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

test-slow: venv  ## the long proofs as well
	$(BIN)/python -m pytest -m "slow or not slow" --numprocesses=2 --dist=loadfile --no-loadscope-reorder

test-latest:  ## the test suite with the newest versions that setup.cfg allows, so that rot is seen early
	$(PYTHON) -m venv --clear $(LATEST)
	$(LATEST)/bin/python -m pip install --quiet --upgrade --editable "$(EXTRAS)"
	@echo "versions that differ from constraints.txt:"
	@diff --ignore-case <(sort constraints.txt) <($(LATEST)/bin/python -m pip freeze --exclude-editable | sort) || true
	$(LATEST)/bin/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

# --strict: a version of which the advisory service knows nothing is an error, not a pass.
audit:  ## known vulnerabilities of the pinned versions, and sbom.cdx.json, a CycloneDX bill of materials
	$(PYTHON) -m venv --clear $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --constraint constraints.txt ".[scann,torch,plot,ray,serve]"
	$(PYTHON) -m venv --clear $(AUDIT)-tools
	$(AUDIT)-tools/bin/python -m pip install --quiet ".[audit]"
	$(AUDIT)-tools/bin/cyclonedx-py environment --output-reproducible --output-file sbom.cdx.json $(AUDIT)/bin/python
	$(AUDIT)-tools/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

constraints:  ## pin what a fresh environment resolves to; run the tests before you keep it
	$(PYTHON) -m venv --clear $(LATEST)
	$(LATEST)/bin/python -m pip install --quiet --upgrade --editable "$(EXTRAS)"
	$(LATEST)/bin/python -m pip freeze --exclude-editable | sort > constraints.txt

lint: venv  ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: venv  ## the reference of both packages, build/docs/index.html; the pages need no network
	$(BIN)/python -m pdoc --docformat google --output-directory build/docs tenrec_jax torch_mlu_backend

venv: $(VENV)/.installed

$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11, 3.12 or 3.13 is needed; name one with PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable "$(EXTRAS)"
	touch $@

clean:
	rm -rf $(VENV) $(AUDIT) $(AUDIT)-tools $(LATEST) build *.egg-info

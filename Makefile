PYTHON ?= python3.11
ARGS ?=
ENV := .venv/.complete

# Every stage of a run, and each library's part in it, in a few minutes.
LOWEST := $(patsubst %,tests/%.py,test_api report/test_page nas/test_sampler tasks/test_scores \
	commands/test_smoke system/test_engine)

.PHONY: help install quickstart test lint bench faults docs lowest audit
.DEFAULT_GOAL := help

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

install: $(ENV) ## The environment alone, into .venv

quickstart: $(ENV) ## The whole job on a real teacher and real text, into lightning_logs/quickstart/
	@.venv/bin/kdnas run --config configs/quickstart.yaml $(ARGS)

test: $(ENV) ## The test suite on all cores; ARGS="-m slow" runs what takes longer, ARGS="tests/test_arch.py -k yaml" a part of it
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist worksteal $(ARGS)

lint: $(ENV) ## Style, format and types
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

bench: $(ENV) ## Every benchmark in benchmarks/
	@set -e; for file in $(sort $(filter-out benchmarks/common.py,$(wildcard benchmarks/*.py))); do .venv/bin/python $$file $(ARGS); done

faults: $(ENV) ## Faults made on purpose, the quick ones; ARGS="--whole" makes all, ARGS="--only F04" some of them
	@.venv/bin/python -m tests.faults $(ARGS)

lowest: $(ENV) ## A part of the test suite with the lowest versions that setup.cfg admits, in .venv-lowest
	@.venv/bin/uv venv -q --clear --python .venv/bin/python .venv-lowest
	@.venv/bin/uv pip install -q --python .venv-lowest/bin/python --resolution lowest-direct -e '.[dev,quickstart]'
	@OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n auto --dist worksteal $(or $(ARGS),$(LOWEST))

audit: $(ENV) ## Known vulnerabilities of the locked versions, as the package index lists them
	@.venv/bin/uv tool run pip-audit --strict -r requirements.txt -r requirements-dev.txt --no-deps --disable-pip $(ARGS)

docs: $(ENV) ## The documentation as a site, into site/
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict $(ARGS)

# Written last, so that an interrupted installation is done again.
$(ENV): requirements.txt requirements-dev.txt setup.cfg pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@echo "Installing requirements-dev.txt into .venv (once, one to ten minutes, at least 2.4 GB) ..."
	@$(PYTHON) -m venv --clear .venv 2>/dev/null || $(PYTHON) -m venv --clear --without-pip .venv
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m pip --python .venv/bin/python install -qq pip
	@.venv/bin/python -m pip install -qq --disable-pip-version-check -r requirements-dev.txt
	@.venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

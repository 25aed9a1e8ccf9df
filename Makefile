# Everything starts from `make setup`, which makes .venv and does nothing while it is up to date.
# Other interpreter: `make setup PYTHON=python3.12`. Arguments for a command: `make test ARGS="-k sums"`.

PYTHON ?= python3
ARGS ?=
# Two processes, each with a Ray of its own; a file's tests stay together and share what they start.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
VENV := .venv
# Touched when set-up has succeeded, so an interrupted one is taken up again.
STAMP := $(VENV)/.set-up

.DEFAULT_GOAL := setup
.PHONY: setup demo test test-full lint types bench fmt

setup: $(STAMP)

# An environment that works is kept, whoever made it; one that is missing, broken or too old is made anew.
USABLE := import sys, pip; sys.exit(sys.version_info < (3, 11))

$(STAMP): pyproject.toml setup.cfg constraints.txt
	@$(VENV)/bin/python -c '$(USABLE)' 2>/dev/null || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
	    "fedpost needs Python 3.11 or newer, which '$(PYTHON)' is not: name another, such as make PYTHON=python3.12" >&2; exit 1; }; \
	  echo "set-up 1 of 2: a virtual environment in $(VENV)"; \
	  $(PYTHON) -m venv --clear $(VENV); }
	@echo "set-up 2 of 2: the packages of constraints.txt (the first time takes minutes: torch is large)"
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check -e ".[dev]" -c constraints.txt
	@touch $@

demo: setup
	$(VENV)/bin/fedpost run experiments/recipes/demo.toml $(ARGS)

test: setup
	$(VENV)/bin/python -m pytest $(TWO) $(ARGS)

test-full: setup
	$(VENV)/bin/python -m pip install -qq --disable-pip-version-check -e ".[dev,cluster,bitsandbytes,torchao]" -c constraints.txt
	$(VENV)/bin/python -m pytest $(TWO) --full $(ARGS)

lint: setup
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

types: setup
	$(VENV)/bin/mypy

bench: setup
	for scenario in lora tiny big_update overhead population cohort memory slots partition secagg strategies zero plan; do \
	  $(VENV)/bin/fedpost bench $$scenario --small $(ARGS) || exit 1; done

fmt: setup
	$(VENV)/bin/ruff format
	$(VENV)/bin/ruff check --fix

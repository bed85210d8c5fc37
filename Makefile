# make demo   the whole job on a small real data set, in minutes, on a CPU
# make test   the tests
# make check  format, lint, types, shell scripts
PYTHON ?= python3
BIN := .venv/bin
SHELL_SCRIPTS := $(shell find slurm tests benchmarks .ci -type f \( -name '*.sh' -o -name run \))

.PHONY: demo test check install clean

install: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13) and \
	  "the lock file holds for Python 3.10 to 3.13: name one, as in make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: install
	$(BIN)/python docs/demo.py

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck $(SHELL_SCRIPTS)

clean:
	rm -rf .venv demo *.egg-info .pytest_cache .mypy_cache .ruff_cache

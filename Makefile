# make demo        the whole job on a small real data set, in minutes, on a CPU
# make test        the tests, but for those of slurm-test
# make slurm-test  the job scripts on a real Slurm, simulated here; root's only
# make faults      a training killed a hundred times, and the other fault tests
# make check       format, lint, types, shell scripts
# make format      format and mend what ruff can
# make fresh-test  demo and test in a fresh Debian root; root's only
PYTHON ?= python3
BIN := .venv/bin
SHELL_SCRIPTS := $(shell find slurm tests benchmarks examples .ci -type f \( -name '*.sh' -o -name run \))

.PHONY: demo test slurm-test faults check format fresh-test install clean

install: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and \
	  "the lock file holds for Python 3.11 to 3.13: name one, as in make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: install
	$(BIN)/python examples/demo.py

# Two files at a time, since most of it is processes that start; one thread each, or they wait for one another.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --ignore=tests/slurm

slurm-test: install
	@if ! command -v slurmctld >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  apt-get update -qq && apt-get install --yes --no-install-recommends slurm-wlm; fi
	IGPT_REQUIRE_SLURM=1 $(BIN)/python -m pytest tests/slurm

faults: install
	$(BIN)/python -m tests.faults.kills 100
	$(BIN)/python -m pytest tests/faults

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck $(SHELL_SCRIPTS)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fresh-test:
	tests/fresh_root.sh $(SUITE)

clean:
	rm -rf .venv demo *.egg-info .pytest_cache .mypy_cache .ruff_cache

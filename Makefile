# `make demo` and `make test` need nothing but make and Python: they set up .venv themselves, once.
PYTHON ?= python3
PY     := .venv/bin/python
STAMP  := .venv/.installed
PIP    := $(PY) -m pip install --disable-pip-version-check --quiet

# .venv has the newest transformers that pyproject.toml allows; the oldest is in an environment of its own.
OLD_VENV  := .venv-5.17
OLD_PY    := $(OLD_VENV)/bin/python
OLD_STAMP := $(OLD_VENV)/.installed
OLD_PIP   := $(OLD_PY) -m pip install --disable-pip-version-check --quiet -c $(OLD_VENV)/constraints.txt

# Clients that the server is tried with, in versions of their own: Python's, and npm's where there is a node.
CLIENTS       := tests/clients
CLIENTS_VENV  := .venv-clients
CLIENTS_STAMP := $(CLIENTS_VENV)/.installed
NPM_STAMP     := $(CLIENTS)/node/node_modules/.installed

JOBS := 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest check-oldest clients check resolve format docs held-out bench clean

help:            ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20

demo: $(STAMP)   ## run a small trained MoE with a quarter of its experts in memory, and check its tokens
	$(PY) -m foreroute.cli.main demo

# Tiny models gain nothing from threads: two processes of one thread each take half the time of one with two.
test: $(STAMP)   ## all tests (ARGS="-k name -x" for some, JOBS=0 for one process)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-oldest: $(OLD_STAMP) ## the same with the oldest transformers that is meant to work
	$(OLD_PY) -m pytest -p no:cacheprovider $(ARGS)

check-oldest: $(OLD_STAMP) ## what CI runs with it: the installed wheel, every model family, the gates of generation
	OMP_NUM_THREADS=1 $(OLD_PY) -m pytest -p no:cacheprovider -n $(JOBS) --dist loadfile \
	  tests/families tests/cli/test_wheel.py tests/gates/test_generation.py tests/gates/test_seam.py $(ARGS)

clients: $(STAMP) $(CLIENTS_STAMP) $(if $(shell command -v npm),$(NPM_STAMP)) ## the server with unmodified clients, in an environment of their own
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile $(CLIENTS) $(ARGS)

check: $(STAMP)  ## format, lint, types (as on other systems too), and who may import whom
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m mypy --platform win32 --cache-dir .mypy_cache/win32
	$(PY) -m mypy --platform darwin --cache-dir .mypy_cache/darwin
	.venv/bin/lint-imports

resolve: $(STAMP) ## whether the pins install from the package index alone, for every Python (plans, installs nothing)
	$(PY) -m tests.install.resolve

format: $(STAMP) ## rewrite the sources as `check` wants them
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

docs: $(STAMP)   ## the documentation's site, into build/site; a broken link is an error
	@# Not --quiet: with it strict sees no warnings.
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

held-out: $(STAMP) ## the text that `foreroute eval --suite builtin` reads (fetches Debian packages through apt)
	$(PY) models/held_out.py

bench: $(STAMP)  ## speed on the small model, then micro-benchmarks; beside other engines: benchmarks/peers.py
	$(PY) -m foreroute.cli.main bench models/foreroute-tiny --quick
	$(PY) -m benchmarks.residency
	$(PY) -m benchmarks.disk

clean:           ## remove what tools made; keeps .venv and the results of benchmarks
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so that an install that broke off is done again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Development needs Python 3.11 or newer, this is %d.%d. Try: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	@echo "Setting up .venv (once, some minutes) ..."
	@test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt pip torch
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

$(CLIENTS_STAMP): $(CLIENTS)/requirements.txt $(CLIENTS)/constraints.txt
	@echo "Setting up $(CLIENTS_VENV) (once, a minute) ..."
	@test -x $(CLIENTS_VENV)/bin/python || $(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install --disable-pip-version-check --quiet \
	  -c $(CLIENTS)/constraints.txt -r $(CLIENTS)/requirements.txt
	@touch $@

# From the lock file alone. npm is not asked where there is none; the tests then say so.
$(NPM_STAMP): $(CLIENTS)/node/package.json $(CLIENTS)/node/package-lock.json
	cd $(CLIENTS)/node && npm ci --silent
	@touch $@

# All else as pinned, but for what the oldest transformers itself holds to older versions.
$(OLD_STAMP): pyproject.toml constraints.txt constraints-oldest.txt
	@echo "Setting up $(OLD_VENV) (once, some minutes) ..."
	@test -x $(OLD_PY) || $(PYTHON) -m venv $(OLD_VENV)
	@sed -n 's/==.*/==/p' constraints-oldest.txt | grep -vFf - constraints.txt > $(OLD_VENV)/constraints.txt
	@cat constraints-oldest.txt >> $(OLD_VENV)/constraints.txt
	$(OLD_PIP) pip torch
	$(OLD_PIP) -e '.[dev]'
	@touch $@

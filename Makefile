# Works with GNU make 3.81, which macOS ships.
PYTHON ?= python3
EXTRAS ?= $(shell [ "$$(uname -s)" = Linux ] && echo cpu,)test
# Tests at once; each is mostly one thread. Neighbours stay together, since a file's tests share models, and who
# has none left takes half of what another has.
JOBS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed
LINTERS := .venv/.linters

.PHONY: demo test test-fast lint clean

demo: $(STAMP)
	$(BIN)/python demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --fast

lint: $(LINTERS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "mlx-dsa needs Python 3.10 or newer; '$(PYTHON)' is older or missing."; \
	  echo "Name one that is newer: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { \
	  rm -rf .venv; \
	  echo "Python could not make a virtual environment."; \
	  echo "On Debian or Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	@echo 'Installing into .venv; this happens once.'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $@

$(LINTERS): $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[lint]'
	@touch $@

clean:
	rm -rf .venv

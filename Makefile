# Each target works on a fresh machine with Python 3.11 or newer: it makes .venv and installs into it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check check-only clean

demo: .venv/demo.done
	$(BIN)/python tools/demo.py

test: .venv/dev.done
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'not alone'
	$(BIN)/python -m pytest -m alone

check: test check-only

check-only: .venv/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/demo.done: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[eval]'
	touch $@

.venv/dev.done: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs build *.egg-info

# Every target works as the only command on a machine with Python 3.11, make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-slow check lint format docs cli-docs bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/base
	$(BIN)/flora demo $(ARGS)

test: $(VENV)/dev
	$(BIN)/pytest $(ARGS)

test-slow: $(VENV)/dev
	$(BIN)/pytest -m slow $(ARGS)

# The figures that the README quotes.
bench: $(VENV)/base
	$(BIN)/flora demo --json docs/results/demo.json

check: lint cli-docs
	git diff --exit-code -- docs/cli.md

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/docs cli-docs
	$(BIN)/mkdocs build --strict

cli-docs: $(VENV)/base
	$(BIN)/typer flora.cli utils docs --name flora --title "Command line" --output docs/cli.md

clean:
	rm -rf $(VENV) site

# One stamp a set of packages: nothing is installed again until a lock file changes.
$(VENV)/base: requirements/torch.txt requirements/base.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --requirement requirements/torch.txt
	$(PIP) --no-deps --requirement requirements/base.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/dev: $(VENV)/base requirements/dev.lock
	$(PIP) --no-deps --requirement requirements/dev.lock
	touch $@

$(VENV)/docs: $(VENV)/base requirements/docs.lock
	$(PIP) --no-deps --requirement requirements/docs.lock
	touch $@

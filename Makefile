# Everything runs in .venv, which `setup` makes; it is a no-op when up to date.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.up-to-date
PYTHON ?= python3
ARGS ?=
# Where a machine forbids Python to keep what it compiles, every process of the tests compiles the package anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo app test test-models nightly durations fuzz lint check quick format bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/circuits demo $(if $(MODEL),--model $(MODEL)) $(ARGS)

app: $(STAMP)
	$(BIN)/circuits app $(ARGS)

# Two workers with one thread each: as fast as it gets on two cores, and the same everywhere. A module's tests stay
# together, so that what they share is made once; the slow modules come first (tests/conftest.py).
SPREAD := --dist loadscope --no-loadscope-reorder
# Every call's tensors against the shapes in its annotations: two thirds more time, so not in `make test`.
SHAPES := --jaxtyping-packages=circuits,apps,tests.typechecker

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 $(SPREAD) -m "not models and not nightly" $(ARGS)

# Published findings on real networks, where CIRCUITS_ASSETS names a folder with their weights; else they are skipped.
test-models: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 $(SPREAD) -m "models and not nightly" $(ARGS) tests

# What takes minutes a test: whole cases, findings on many units of real networks, and the same for more seeds.
nightly: $(STAMP)
	$(BIN)/circuits fetch smollm2
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 $(SPREAD) -m nightly --timeout=3600 $(SHAPES) $(ARGS)

# What each test takes on this machine, with nothing beside it: `make check` goes by it.
durations: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 $(SPREAD) --measure -m "not models and not nightly" $(ARGS)

# Searches for inputs that break a property; `make fuzz SEED=n` repeats the search that printed n.
fuzz: $(STAMP)
	@seed=$(or $(SEED),$$($(BIN)/python -c "import secrets; print(secrets.randbits(32))")); \
	echo "SEED=$$seed"; \
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 $(SPREAD) -m hypothesis --timeout=3600 \
	  --hypothesis-profile=fuzz --hypothesis-seed=$$seed tests $(ARGS) \
	  || { echo "to repeat it: make fuzz SEED=$$seed"; exit 1; }

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

# Side by side: pyright takes one core for as long as the quick tests take.
check: $(STAMP)
	$(MAKE) --no-print-directory -j 2 lint quick

# Without the command line's tests: they pass stand-ins for models and results, which the shape checks refuse.
quick: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 $(SPREAD) $(SHAPES) --quick -m "not browser and not models and not nightly" --ignore-glob="tests/test_cli*" $(ARGS)

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	set -e; for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file $(ARGS); done

clean:
	rm -rf $(VENV) artifacts

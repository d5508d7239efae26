# Every target works in a bare clone that has nothing but Python 3.11 and make:
# the first one that is run creates .venv with the versions of constraints.txt.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Stamps: an environment is installed once, and again when what it is made of changes.
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.bench-ready

# Tests start more than a hundred processes: each would compile the sources again.
export PYTHONDONTWRITEBYTECODE :=

# More flags for the job, as in `make train ARGS="--epochs=20 --steps_per_epoch=1000"`.
ARGS ?=

.PHONY: help install train test test-fast test-exhaustive test-faults soak test-ray check lint benchmark benchmark-torch clean

help:
	@echo "make train      train the GAN on MNIST digits with 2 replicas, into runs/gan"
	@echo "make test       all tests"
	@echo "make test-fast  the tests that take no minutes and start no processes"
	@echo "make test-exhaustive  all tests in all variants: hours"
	@echo "make test-faults      a run and what can go wrong with it, in all combinations"
	@echo "make soak       50 random kills of one training"
	@echo "make test-ray   the example for Ray, which is installed for it"
	@echo "make check      what a commit should pass, in seconds: lint and import rules"
	@echo "make lint       ruff and mypy"
	@echo "make benchmark  distfit and its peers on the same work, side by side"
	@echo "make benchmark-torch  install PyTorch, so that it takes part as well"
	@echo "make clean      remove the environment and what tools have left"

install: $(READY)

train: $(READY)
	$(BIN)/python -m launch --strategy=mirrored --virtual_devices=2 \
		--workdir=runs/gan $(ARGS)

# One more process than cores: tests that start others wait for them.
test: $(READY)
	$(BIN)/python -m pytest -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist loadfile --no-loadscope-reorder

test-fast: $(READY)
	$(BIN)/python -m pytest -m "not integration and not slow" -n auto --dist loadfile

# Every fault with every program at every moment: an hour or two.
test-faults: $(READY)
	EXHAUSTIVE=1 $(BIN)/python -m pytest -m integration tests/integration/test_faults.py

# 50 random kills of one training: about 20 minutes.
soak: $(READY)
	$(BIN)/python tests/integration/soak.py $(ARGS)

# All numbers of replicas, all sizes of batches, more examples of each property.
test-exhaustive:
	EXHAUSTIVE=1 $(MAKE) test

# Not part of the tests for its size, 500 MB.
test-ray: $(READY)
	$(PIP) -e '.[dev,ray]'
	$(BIN)/python -m pytest -m integration tests/integration/test_ray.py

check: lint
	$(BIN)/python -m pytest -q tests/test_layering.py

lint: $(READY)
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

# Orbit is part of tf-models-official, which declares an older TensorFlow and dozens of
# packages that Orbit does not use: --no-deps takes it alone.
benchmark: $(BENCH_READY)
	$(BIN)/python -m benchmarks.run $(ARGS)
	$(BIN)/python -m benchmarks.saving

# Not part of the above for its size.
benchmark-torch: $(BENCH_READY)
	$(PIP) -e '.[bench-torch]'

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	touch $@

$(BENCH_READY): $(READY)
	$(PIP) -e '.[bench]'
	$(PIP) --no-deps tf-models-official
	touch $@

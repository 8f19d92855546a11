# setup demo check test: the same four here, in the README and in CI.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := MKL_CBWR=AUTO,STRICT OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder
# one thread each on two cores; a third worker, because tests of processes wait. CBWR: on AMD processors MKL's products
# depend on where numbers lie in memory, and tests that compare bits put the same numbers elsewhere

.PHONY: setup demo check test test-all test-kernels clean

setup: $(BIN)/scumble

$(BIN)/scumble: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(BIN)/scumble

demo: setup        ## train a LoRA on the embedded base, see it work, load it in diffusers
	$(BIN)/scumble demo

check: setup       ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy src/scumble

test: setup        ## everything that protects the main job
	$(PYTEST) -m "not thorough"

test-all: setup    ## every case: every mix of dtypes in every family, two hosts, photographs
	$(PYTEST)

# diffusers imports bitsandbytes wherever it is, 0.9 s in every process: beside the environment, for these tests alone
test-kernels: setup  ## bases in few bits, read by bitsandbytes' kernels
	test -d $(VENV)/beside || $(BIN)/pip install -q --disable-pip-version-check --no-deps --target $(VENV)/beside bitsandbytes==0.50.2
	PYTHONPATH=$(VENV)/beside $(PYTEST) tests/models/test_kernels.py tests/laws/test_quantized.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

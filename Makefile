# Two targets do everything on a fresh machine: make demo, make test.  Each makes .venv first when it is missing.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
OUT ?= demo_output
JOBS ?= 2

.PHONY: demo test check test-cuda bench walk clean

demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m demo --output_dir $(OUT)

test: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest tests/test_layers.py

# On a GPU machine; PYTEST="python3 -m pytest" uses an environment that has torch with CUDA already.
PYTEST ?= $(BIN)/python -m pytest
test-cuda:
	$(PYTEST) -m "cuda or multi_gpu"

# On a GPU machine too; BENCH=python3 uses an environment that has torch with CUDA already.
BENCH ?= $(BIN)/python
bench: $(if $(filter $(BIN)/%,$(BENCH)),$(READY))
	$(BENCH) benchmarks/bench_generate.py --model_version v1_7b v2_13b --batch_size 1 64
	$(BENCH) benchmarks/bench_kernels.py
	$(BENCH) benchmarks/bench_load.py

# The README's workflow, every kind of command: WALK="--model_version v2_13b", WALK=--small on a machine without a GPU.
walk: $(if $(filter $(BIN)/%,$(BENCH)),$(READY))
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BENCH) benchmarks/walk.py $(WALK)

$(READY): requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

clean:
	rm -rf .venv $(OUT)

# Two targets do everything on a fresh machine: make demo, make test.  Each makes .venv first when it is missing.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
OUT ?= demo_output
JOBS ?= 2
FLAGS ?=  # more flags for pytest

.PHONY: demo test doctor check fuzz lock test-newest test-oldest test-cuda bench walk clean

demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m demo --output_dir $(OUT)

test: $(READY)
	$(call pytest,$(BIN))

doctor: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m baichuan.doctor

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

# Mutated inputs of every script, and kills of those that write; CASES=100000 KILLS=200 take half an hour on two cores.
CASES ?= 2000
KILLS ?= 200
SEED ?= 1
fuzz: $(READY)
	$(BIN)/python -m tests.kill --kills $(KILLS) --seed $(SEED)
	$(BIN)/python -m tests.fuzz --cases $(CASES) --seed $(SEED)

$(READY): requirements.txt pyproject.toml
	@$(KNOWN)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

KNOWN = $(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v < (3, 14) or sys.exit( \
    "Python %d.%d is not 3.10 to 3.13; name one that is, as in make PYTHON=python3.13 demo" % v)'

# pytest in the environment whose programs are in the folder $1, on the tests $2 or all
pytest = PATH="$(CURDIR)/$1:$$PATH" OMP_NUM_THREADS=1 $1/python -m pytest -n $(JOBS) $(FLAGS) $2

# requirements.txt: the newest of every package that pyproject.toml's ranges allow, for all Pythons of its range.
# PyTorch names its own CUDA packages exactly; without them here, PyTorch for the CPU downloads none.
UV ?= $(BIN)/uv
lock: $(if $(filter $(BIN)/%,$(UV)),$(READY))
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(UV) pip compile --quiet --universal --python-version 3.10 \
	    --extra dev --annotation-style line pyproject.toml --output-file requirements.new
	sed -E '/^(nvidia|cuda)-/d' requirements.new > requirements.txt
	rm requirements.new

# The ends of the ranges, each in an environment of its own: the newest of every package, and the oldest transformers.
test-newest:
	@$(KNOWN)
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --editable '.[dev]'
	$(call pytest,.venv-newest/bin)

OLDEST = $(shell sed -nE 's/.*"(transformers)>=([0-9.]+),.*/\1==\2/p' pyproject.toml)
test-oldest:
	@$(KNOWN)
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --editable '.[dev]' $(OLDEST)
	$(call pytest,.venv-oldest/bin,tests/test_hf.py tests/test_hf_folders.py tests/test_beam.py tests/test_summarize.py tests/test_summary_figures.py tests/test_stopped_evaluation.py)

# On a GPU machine; PYTEST="python3 -m pytest" uses an environment that has torch with CUDA already, GPU_JOBS= one process.
PYTEST ?= $(BIN)/python -m pytest
GPU_JOBS ?= 4
test-cuda:
	$(PYTEST) $(if $(GPU_JOBS),-n $(GPU_JOBS)) -m cuda
	$(PYTEST) -m multi_gpu

# On a GPU machine too; BENCH=python3 uses an environment that has torch with CUDA already.
BENCH ?= $(BIN)/python
bench: $(if $(filter $(BIN)/%,$(BENCH)),$(READY))
	$(BENCH) benchmarks/bench_generate.py --model_version v1_7b v2_13b --batch_size 1 64
	$(BENCH) benchmarks/bench_kernels.py
	$(BENCH) benchmarks/bench_load.py
	$(BENCH) benchmarks/bench_traffic.py

# The README's workflow, every kind of command: WALK="--model_version v2_13b", WALK=--small on a machine without a GPU.
walk: $(if $(filter $(BIN)/%,$(BENCH)),$(READY))
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BENCH) benchmarks/walk.py $(WALK)

clean:
	rm -rf .venv .venv-newest .venv-oldest $(OUT)

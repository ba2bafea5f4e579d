# The two commands of the README, and those of the people who build it. Each creates .venv if needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test bench lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train a TarFlow on 5,000 digits, draw samples, measure (runs/demo/)"
	@echo "make test    the whole test suite"
	@echo "make bench   time ops and model against plain PyTorch, update the README's table"
	@echo "make lint    formatting, lint and banned calls"

# torch comes first and pinned: a range would let pip take a build for another device.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy
	@touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/cpu/*)
	$(PIP) --editable '.[demo]'
	@$(BIN)/flowops doctor | grep ' cpu  '
	@touch $@

$(VENV)/test: $(VENV)/demo
	$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/lint: $(VENV)/torch
	$(PIP) ruff clang-format
	@touch $@

demo: $(VENV)/demo
	$(BIN)/flowops demo

test: $(VENV)/test
	$(BIN)/python -m pytest

bench: $(VENV)/demo
	$(BIN)/flowops bench --readme

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/cpu/*.h csrc/cpu/*.cpp
	@sh .ci/banned

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/cpu/*.h csrc/cpu/*.cpp

clean:
	rm -rf $(VENV) build *.egg-info flowops/_C.*.so flowops/_native_note.txt

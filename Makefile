# make train [CONFIG=configs/demo.py] [NPROC=2] [ARGS="max_steps=3000 ..."]
# make test [ARGS="-k resume"]     make test-quick     make gpu-check [ARGS="-k memory"]
# NPROC: processes; without it 2, or 1 where there is a single GPU
PYTHON ?= python3
CONFIG ?= configs/demo.py
NPROC ?= $(shell $(BIN)/python -c "import torch; print(min(2, torch.accelerator.device_count() or 2))")
ARGS ?=
WRONG_PYTHON = $(PYTHON) is not Python 3.11 to 3.13; name one that is with PYTHON=python3.12
export OMP_NUM_THREADS ?= 1
BIN = .venv/bin

.PHONY: train test test-quick lint gpu-check clean

train: .venv/runtime
	@if [ "$(CONFIG)" = configs/demo.py ]; then $(BIN)/python data.py demo; fi
	$(BIN)/python -m refocused.run.launch --standalone --nproc_per_node=$(NPROC) train.py $(CONFIG) $(ARGS)

test: .venv/dev
	$(BIN)/python -m pytest $(ARGS)

test-quick: .venv/dev
	FUZZ_CASES=200 $(BIN)/python -m pytest -n auto -m "not slow and not long" $(ARGS)

gpu-check: .venv/dev
	$(BIN)/python -m pytest -q -n 0 --device cuda --timeout 600 $(ARGS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 0 tests/test_house.py

.venv/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else '$(WRONG_PYTHON)')"
	$(PYTHON) -m venv .venv

.venv/runtime: .venv/bin/python requirements.txt
	@echo "installing requirements.txt into .venv; PyTorch is large, this takes minutes"
	.venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	.venv/bin/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv data/demo out logs

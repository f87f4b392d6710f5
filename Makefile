# make train [CONFIG=configs/demo.py] [NPROC=2] [ARGS="max_steps=3000 ..."]     make test [ARGS="-k resume"]     make gpu-check [ARGS="--part 3"]
# NPROC: processes; without it 2, or 1 where there is a single GPU
PYTHON ?= python3
CONFIG ?= configs/demo.py
NPROC ?= `python -c "import torch; print(min(2, torch.accelerator.device_count() or 2))"`
ARGS ?=
WRONG_PYTHON = $(PYTHON) is not Python 3.11 to 3.13; name one that is with PYTHON=python3.12
export OMP_NUM_THREADS ?= 1
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: train test lint gpu-check clean

train: .venv/runtime
	@if [ "$(CONFIG)" = configs/demo.py ]; then python data.py demo; fi
	python -m refocused.run.launch --standalone --nproc_per_node=$(NPROC) train.py $(CONFIG) $(ARGS)

test: .venv/dev
	python -m pytest $(ARGS)

gpu-check: .venv/dev
	python -m refocused.measure.acceptance $(ARGS)

lint: .venv/dev
	ruff check .
	ruff format --check .
	lint-imports
	mypy
	python -m pytest -q -n 0 tests/test_house.py

.venv/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else '$(WRONG_PYTHON)')"
	$(PYTHON) -m venv .venv

.venv/runtime: .venv/bin/python requirements.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv data/demo out logs

# make train [CONFIG=configs/demo.py] [NPROC=2] [ARGS="max_steps=50 ..."]     make test [ARGS="-k resume"]
# NPROC: processes; without it 2, or 1 where there is a single GPU
PYTHON ?= python3
CONFIG ?= configs/demo.py
NPROC ?= `python -c "import torch; print(min(2, torch.accelerator.device_count() or 2))"`
ARGS ?=
export OMP_NUM_THREADS ?= 1
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: train test lint clean

train: .venv/runtime
	@if [ "$(CONFIG)" = configs/demo.py ]; then python data.py demo; fi
	torchrun --standalone --nproc_per_node=$(NPROC) train.py $(CONFIG) $(ARGS)

test: .venv/dev
	python -m pytest $(ARGS)

lint: .venv/dev
	ruff check .
	ruff format --check .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/runtime: .venv/bin/python requirements.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv data/demo out logs

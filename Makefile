# make demo   train and evaluate a small MLLA on handwritten digits, on this machine
# make test   lint, format, types and tests
# make soak   interrupt training many times; the results must be those of a run left alone (a quarter of an hour)
# make clean  remove the virtual environment and what builds left; results in output/ stay

PYTHON ?= python3
BIN := .venv/bin
DEMO_OUTPUT := output
DEMO_RUN := $(DEMO_OUTPUT)/mlla_digits/default
# One process for each GPU, two at most; two on a CPU.
COUNT_PROCESSES := import torch; print(min(2, torch.cuda.device_count() or 2))

.PHONY: demo test lint soak clean

demo: .venv/installed
	processes=$$($(BIN)/python -c '$(COUNT_PROCESSES)') && export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} && \
	$(BIN)/torchrun --standalone --nproc_per_node=$$processes main.py --cfg cfgs/digits.yaml --amp --output $(DEMO_OUTPUT) && \
	$(BIN)/torchrun --standalone --nproc_per_node=$$processes main.py --cfg cfgs/digits.yaml --amp --output $(DEMO_OUTPUT) \
		--eval --resume $(DEMO_RUN)/max_ema_acc.pth
	@echo "Results: $(DEMO_RUN) (curves.png, predictions.png, metrics.jsonl, log_rank0.txt, checkpoints)"

test: lint
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: .venv/installed
	$(BIN)/python tests/soak.py

# Installed again only when requirements.txt changes.
.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is $$($(PYTHON) --version); Python 3.10 or later is needed: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv build mlla.egg-info

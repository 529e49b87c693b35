# make demo               train and evaluate a small MLLA on handwritten digits, on this machine
# make fashion            train MLLA on Fashion-MNIST, whose files it finds or explains how to get; FASHION=<folder> names another
# make demo-detection     train and evaluate a small Mask R-CNN on rendered shapes, on this machine
# make demo-segmentation  render shapes, train and evaluate a small UperNet on them
# make finetune           train on five digits, then on all ten at another size, from those weights and from scratch
# make ablation           train all rows of the paper's tables 1 and 2 on digits, three seeds each; ABLATION='--epochs 50' for more
# make test               lint, format, types and tests
# make test-fast          the unit tests that take less than a second each, in under a minute on two cores
# make test-kernels       the tests of the Triton kernels: on a GPU, or on a CPU through Triton's interpreter
# make test-oldest        the tests with the oldest supported torch, torchvision and timm, in .venv-oldest
# make soak               inject faults into training for half an hour; results must equal those of runs left alone; SOAK='--minutes 5' for less
# make gpus               measure this machine's GPUs together: speed, scaling, exactness, survival; GPUS='--gpus 2 --minutes 7' for less
# make bench-data         measure images per second and core of the data pipeline, beside timm's
# make clean              remove the virtual environments and build folders; keep output/

PYTHON ?= python3
BIN := .venv/bin
DEMO_OUTPUT := output
DEMO_RUN := $(DEMO_OUTPUT)/mlla_digits/default
# One process per GPU, at most two; two on a CPU.
COUNT_PROCESSES := import torch; print(min(2, torch.cuda.device_count() or 2))

.PHONY: demo fashion demo-detection demo-segmentation finetune ablation test test-fast test-kernels test-oldest lint soak gpus bench-data clean

demo: .venv/installed
	processes=$$($(BIN)/python -c '$(COUNT_PROCESSES)') && export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} && \
	$(BIN)/torchrun --standalone --nproc_per_node=$$processes main.py --cfg cfgs/digits.yaml --amp --output $(DEMO_OUTPUT) && \
	$(BIN)/torchrun --standalone --nproc_per_node=$$processes main.py --cfg cfgs/digits.yaml --amp --output $(DEMO_OUTPUT) \
		--eval --resume $(DEMO_RUN)/max_ema_acc.pth
	@echo "Results: $(DEMO_RUN) (curves.png, predictions.png, metrics.jsonl, log_rank0.txt, checkpoints)"

fashion: .venv/installed
	suffix=$$($(BIN)/python -c 'import torch; print("" if torch.cuda.is_available() else "_cpu")') && \
	$(BIN)/python main.py --cfg cfgs/fashion_mnist$${suffix}.yaml --amp --output $(DEMO_OUTPUT) $(if $(FASHION),--data-path $(FASHION)) && \
	echo "Results: $(DEMO_OUTPUT)/mlla_fashion_mnist$$suffix/default (curves.png, predictions.png, metrics.jsonl, log_rank0.txt, checkpoints)"

SEGMENTATION := -m downstream.segmentation.main --cfg downstream/segmentation/cfgs/shapes.yaml \
	--data-path $(DEMO_OUTPUT)/segmentation_shapes --amp --output $(DEMO_OUTPUT)
SEGMENTATION_RUN := $(DEMO_OUTPUT)/shapes_upernet/default

demo-segmentation: .venv/installed
	$(BIN)/python -m downstream.segmentation.make_shapes $(DEMO_OUTPUT)/segmentation_shapes
	processes=$$($(BIN)/python -c '$(COUNT_PROCESSES)') && export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} && \
	$(BIN)/torchrun --standalone --nproc_per_node=$$processes $(SEGMENTATION) && \
	$(BIN)/torchrun --standalone --nproc_per_node=$$processes $(SEGMENTATION) --eval --resume $(SEGMENTATION_RUN)/max_ema_miou.pth
	@echo "Results: $(SEGMENTATION_RUN) (predictions.png, curves.png, metrics.jsonl, evaluations.jsonl, checkpoints)"

finetune: .venv/installed
	processes=$$($(BIN)/python -c '$(COUNT_PROCESSES)') && export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} && \
	run="$(BIN)/torchrun --standalone --nproc_per_node=$$processes main.py --amp --output $(DEMO_OUTPUT) --cfg" && \
	$$run cfgs/digits_pretrain.yaml && \
	$$run cfgs/digits_finetune.yaml --tag scratch && \
	$$run cfgs/digits_finetune.yaml --tag finetuned \
		--pretrained $(DEMO_OUTPUT)/mlla_digits_pretrain/default/max_ema_acc.pth
	@grep -H "best top-1" $(DEMO_OUTPUT)/mlla_digits_finetune/*/log_rank0.txt

DETECTION := -m downstream.detection.main --cfg downstream/detection/cfgs/shapes.yaml --amp \
	--data-path $(DEMO_OUTPUT)/shapes --output $(DEMO_OUTPUT)
DETECTION_RUN := $(DEMO_OUTPUT)/mask_rcnn_shapes/default

demo-detection: .venv/installed
	processes=$$($(BIN)/python -c '$(COUNT_PROCESSES)') && export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} && \
	$(BIN)/python -m downstream.detection.make_shapes $(DEMO_OUTPUT)/shapes && \
	$(BIN)/torchrun --standalone --nproc_per_node=$$processes $(DETECTION) && \
	$(BIN)/torchrun --standalone --nproc_per_node=$$processes $(DETECTION) --eval --resume $(DETECTION_RUN)/max_box_ap.pth
	@echo "Results: $(DETECTION_RUN) (curves.png, predictions.jpg, metrics.jsonl, results_model.json, checkpoints)"

ablation: .venv/installed
	$(BIN)/python -m models.ablation_study --output output/ablation $(ABLATION)

# Triton's interpreter is chosen when Triton is imported, so the tests of the kernels are processes of their own.
PYTEST := -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal
TESTS := $(PYTEST) tests --ignore=tests/kernels
KERNEL_TESTS := $(PYTEST) tests/kernels
INTERPRETS := import torch; print(int(not torch.cuda.is_available()))

test: lint
	$(BIN)/python $(TESTS)
	$(MAKE) test-kernels

test-fast: .venv/installed
	$(BIN)/python $(TESTS) -m "not slow"

test-kernels: .venv/installed
	TRITON_INTERPRET=$$($(BIN)/python -c '$(INTERPRETS)') $(BIN)/python $(KERNEL_TESTS)

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python $(TESTS)
	TRITON_INTERPRET=$$(.venv-oldest/bin/python -c '$(INTERPRETS)') .venv-oldest/bin/python $(KERNEL_TESTS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: .venv/installed
	$(BIN)/python tests/soak.py $(SOAK)

gpus: .venv/installed
	$(BIN)/python tests/gpus.py $(GPUS)

bench-data: .venv/installed
	$(BIN)/python -m data.benchmark

# Installed again only when requirements.txt changes.
.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is $$($(PYTHON) --version); Python 3.10 or later is needed: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# Only these packages have versions with different features; others are installed at their newest. The interpreter of
# Triton 3.2, which tests the kernels, fails with NumPy 2.2 and later.
OLDEST = $(shell sed -nE 's/^(torch|torchvision|timm)>=([0-9.]+).*/"\1==\2.*"/p' requirements.txt) "numpy<2.2"

.venv-oldest/installed: requirements.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt $(OLDEST)
	touch $@

clean:
	rm -rf .venv .venv-oldest build mlla.egg-info

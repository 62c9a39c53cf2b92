# Every target sets up what it needs: a virtual environment in .venv, with uv if it is there and pip otherwise.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint fix bench bench-accuracy bench-cost bench-qat bench-tasks compat corpus fuzz kills lowest lowest-tenth clean

help: ## show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml qconv/__init__.py
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --allow-existing --python $(PYTHON) $(VENV) && \
	  uv pip install --quiet --python $(BIN)/python -e '.[dev,bench,report,detect]'; \
	else \
	  $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,bench,report,detect]'; \
	fi
	@touch $(STAMP)

demo: $(STAMP) ## quantize the model that the repository carries with its own pictures
	$(BIN)/qconv quantize tests/models/cifar_mobilenet.onnx --calib calib_samples --preprocess imagenet --resize exact -o demo.w8a8.onnx

test: $(STAMP) ## run the tests
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

lint: $(STAMP) ## check style, types and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

fix: $(STAMP) ## mend what the linters can mend, write the generated pages of the manual
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m tests.support.reference

bench: $(STAMP) ## measure against ONNX Runtime's own quantizer; needs models and pictures, see tests/bench
	$(BIN)/python -m tests.bench $(ARGS)
	$(BIN)/python -m tests.bench.calibration
	$(BIN)/python -m tests.bench.calibrators
	$(BIN)/python -m tests.bench.detection
	$(BIN)/python -m tests.bench.kernels
	$(BIN)/python -m tests.bench.placement
	$(BIN)/python -m tests.bench.families

bench-accuracy: $(STAMP) ## measure accuracy at every bit-width, beside other tools and published numbers
	$(BIN)/python -m tests.bench.bits $(ARGS)

bench-cost: $(STAMP) ## measure what default runs cost in CPU time and memory; ARGS="--before TREE" for an earlier commit
	$(BIN)/python -m tests.bench.conversions $(ARGS)

bench-qat: $(STAMP) ## measure post-training quantization against training; needs qconv[torch]
	$(BIN)/python -m tests.bench.qat $(ARGS)

bench-tasks: $(STAMP) ## measure detectors and segmenters by mAP, mIoU and boxes found, beside ONNX Runtime's quantizer
	$(BIN)/python -m tests.bench.tasks $(ARGS)

compat: $(STAMP) ## run the files in ONNX Runtime 1.17 to the newest, each in an environment of its own
	$(BIN)/python -m tests.bench.compat $(ARGS)

corpus: $(STAMP) ## run the onnx package's backend tests through quantize, inspect and audit
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m tests.robustness.corpus $(ARGS)

fuzz: $(STAMP) ## run 10,000 damaged files through the commands that read them
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m tests.robustness.fuzz $(ARGS)

kills: $(STAMP) ## kill every command that writes at 200 random moments; with qconv[torch] also those that train
	$(BIN)/python -m tests.robustness.kills $(ARGS)

lowest: ## run demo and tests with the lowest versions that pyproject.toml allows, then with the newest
	$(PYTHON) tests/lowest.py .lowest
	$(MAKE) --no-print-directory VENV=.lowest demo test
	$(PYTHON) tests/lowest.py --newest .newest
	$(MAKE) --no-print-directory VENV=.newest demo test

lowest-tenth: ## run demo and a tenth of the tests with the lowest versions
	$(PYTHON) tests/lowest.py .lowest
	$(MAKE) --no-print-directory VENV=.lowest ARGS=--tenth demo test

clean: ## remove what the other targets made
	rm -rf $(VENV) .compat .corpus .fuzz .lowest .newest demo.w8a8.onnx .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

# Two commands on a fresh machine with Python 3.10 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_WORKERS ?= 2

.PHONY: demo test test-loops torture lint types docs install clean

demo: $(VENV)/installed
	$(BIN)/conadv demo

test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS)

# Other people's loops and formats, in a virtual environment of their own over the first one's packages.
LOOPS := $(VENV)-loops
test-loops: $(VENV)/installed-test
	@if $(MAKE) --quiet $(LOOPS)/installed; then \
		OMP_NUM_THREADS=1 $(LOOPS)/bin/python -m pytest tests/test_examples.py tests/test_export.py tests/test_loggers.py \
			tests/test_shared_tensors.py; \
	else \
		echo "test-loops: skipped: Lightning, Accelerate, ONNX and Weights & Biases cannot be installed here"; \
	fi

torture: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.torture all

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/installed-lint
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

install: $(VENV)/installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "conadv needs Python 3.10 or newer: make PYTHON=python3.x ...")'
	$(PYTHON) -m venv $(VENV)

# A stamp is made after its installation, so that one that was cut off is made up for.
$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/installed-test: pyproject.toml $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

$(LOOPS)/installed: pyproject.toml $(VENV)/installed-test
	$(BIN)/python -m venv $(LOOPS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(LOOPS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first.pth"
	$(LOOPS)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[lightning,accelerate,onnx,wandb]'
	touch $@

$(VENV)/installed-lint: pyproject.toml $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[lint]'
	touch $@

$(VENV)/installed-docs: pyproject.toml $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-loops site .pytest_cache .mypy_cache .ruff_cache build *.egg-info

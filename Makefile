# make demo   trains a small NSA model and its dense twin on a book, then opens the report's path
# make test   runs the CPU tests
# Both build .venv first, and again only when pyproject.toml or the constraints change.
#
# Linux without a GPU, installing from PyPI: add
#   PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# or pip fetches the CUDA build of PyTorch, which works too but takes gigabytes.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_FLAGS ?=
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_FLAGS)
INPUTS := pyproject.toml constraints/cpu.txt

.PHONY: demo test venv clean

demo: $(VENV)/installed-demo
	$(VENV)/bin/nsa demo

test: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest -m "not gpu" -n 2

venv: $(VENV)/installed-dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=25.1"

# Without the evaluation extra, whose dependencies take as long to install as all the rest.
$(VENV)/installed-demo: $(INPUTS) | $(VENV)/bin/python
	@echo "Installing PyTorch, transformers and nsa into $(VENV): a minute or two, once."
	$(PIP) -c constraints/cpu.txt -e ".[train,plot]"
	touch $@

$(VENV)/installed-dev: $(INPUTS) | $(VENV)/bin/python
	@echo "Installing nsa with all extras and the development tools into $(VENV), once."
	$(PIP) -c constraints/cpu.txt -e ".[all]" --group dev
	touch $@ $(VENV)/installed-demo

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache

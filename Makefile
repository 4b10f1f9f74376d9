# Everything a newcomer or a CI job types. `make` alone lists it.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV ?= .venv
MODEL := models/all-MiniLM-L6-v2
BIN := $(VENV)/bin
# -n 2: the tests start servers of their own; more of them than cores only makes them slow.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help demo test check golden docs locks model wheel bench-peers image-check gpu-check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.demo model  ## serve a real model in fp16, bf16 and 8-bit, measure each, write the report (no GPU, Docker or hub needed)
	$(BIN)/inferctl bench --model $(MODEL) --plan quick --output demo --report demo/report.html

test: check model  ## lint, types and all tests this machine allows; what is skipped is listed with its reason
	$(PYTEST)

check: $(VENV)/.dev  ## lint, format and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

golden: $(VENV)/.dev model  ## write the golden files anew; read the diff before you commit it
	$(PYTEST) -q --update-golden

docs: $(VENV)/.dev  ## write docs/reference.md anew from the command line's own help
	$(BIN)/python docs/write_reference.py

locks: $(VENV)/.dev  ## resolve the shipped locks anew (needs the package index)
	for base in cpu cuda12.8 cuda13.0 ngc25.12; do \
	  $(BIN)/inferctl lock --base $$base --output base-images/locks/$$($(BIN)/python -c "from inferctl import catalog; print(catalog.base('$$base').stack)") || exit 1; \
	done

model: $(VENV)/.demo  ## fetch the real all-MiniLM-L6-v2, checksum verified
	@$(BIN)/python benchmarks/fetch_model.py $(MODEL)

wheel: $(VENV)/.dev  ## build the wheel into dist/
	$(BIN)/python -c "import os; os.makedirs('dist', exist_ok=True); from hatchling.build import build_wheel; print('dist/' + build_wheel('dist'))"

bench-peers: $(VENV)/.dev model  ## what a rebuild costs beside plain Dockerfiles; needs Docker and a registry at localhost:5000
	$(BIN)/python benchmarks/peers/rebuild.py

image-check: $(VENV)/.dev model  ## build the CUDA 13.0 image from its shipped lock and verify it on the CPU (as root; 3 GB to download)
	.ci/image-check $(BIN)/python

gpu-check: $(VENV)/.dev model  ## on a GPU machine: the gpu tests and a benchmark; the receipt goes to benchmarks/results/
	INFERCTL_REQUIRE=gpu $(PYTEST) -n 0 -m gpu
	$(BIN)/inferctl bench --model $(MODEL) --plan precision --output benchmarks/results

clean:  ## remove the environment and everything generated, but not the model
	rm -rf $(VENV) demo dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'error: Python 3.11 or newer is needed'; echo; echo 'hint: apt-get install python3 python3-venv, or make PYTHON=/path/to/python3.11'; exit 1; }
	@echo "setting up $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'error: no virtual environment could be made'; echo; echo 'hint: apt-get install python3-venv'; exit 1; }

# torch is the large part: PyPI's own build brings CUDA (about 3 GB); pip's settings (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL) can name a CPU build.
$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "installing inferctl with torch, transformers and Locust ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[serve,int8,bench]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.demo
	@echo "installing the development tools ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all,dev]'
	@touch $@

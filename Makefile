# `make help` lists the commands.
PYTHON  ?= python3
PROFILE ?= default
OUT     ?= runs/$@

VENV := .venv
BIN  := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help venv test test-slow test-deepspeed test-oldest test-clients quality style commonsense math glue vision
.PHONY: bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(BIN)/.complete ## make the environment in .venv with the tested versions

$(BIN)/.complete: setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

test: venv ## run the tests
	$(BIN)/python -m pytest -m "not slow"

test-slow: venv ## run the tests that need the real model and data, or take minutes
	$(BIN)/python -m pytest -m slow

test-deepspeed: venv ## install DeepSpeed and run the ZeRO tests (on the CPU; needs a C++ compiler)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[deepspeed]'
	$(BIN)/python -m pytest -m "" tests/runs/test_sharded.py -k zero

test-oldest: .venv-oldest/.complete ## run the library's tests with the oldest supported versions, in .venv-oldest
	.venv-oldest/bin/python -m pytest -m "not slow" --ignore tests/recipes

.venv-oldest/.complete: setup.cfg constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[test]'
	@touch $@

test-clients: .venv-clients/.complete ## run what loads a trained model elsewhere (lm-eval, PEFT, ...), in .venv-clients
	.venv-clients/bin/python -m pytest tests/clients

.venv-clients/.complete: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[clients]'
	@touch $@

quality: venv ## check lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

style: venv ## fix lint and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

FINETUNE = $(BIN)/python -m recipes.finetune --profile recipes/$@/$(PROFILE).args --output_dir "$(OUT)" \
	$(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)") $(if $(BUDGET),--budget $(BUDGET)) $(ARGS)

commonsense: venv ## fine-tune and evaluate on commonsense questions (PROFILE=, MODEL=, DATA=, BUDGET=, OUT=, ARGS=)
	$(FINETUNE)

math: venv ## fine-tune and evaluate on math word problems (as above)
	$(FINETUNE)

CLASSIFY = $(BIN)/python -m recipes.classify --profile recipes/$@/$(PROFILE).args --output_dir "$(OUT)" \
	$(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)") $(if $(BUDGET),--budget $(BUDGET)) $(ARGS)

glue: venv ## fine-tune a classifier of texts in several ways and compare (as above)
	$(CLASSIFY)

vision: venv ## fine-tune a classifier of images in several ways and compare (as above; PROFILE=resnet)
	$(CLASSIFY)

bench: venv ## measure step time and memory of SMT and other methods (SHAPE=, BASE=, OUT=, ARGS=)
	$(BIN)/python -m recipes.benchmarks.training_step --output "$(OUT)" $(if $(SHAPE),--shape $(SHAPE)) \
	$(if $(BASE),--base $(BASE)) $(ARGS)

clean: ## remove the environment and caches
	rm -rf $(VENV) .venv-oldest .venv-clients *.egg-info .pytest_cache .ruff_cache .hypothesis

# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= $(shell for p in python3.12 python3.13 python3.11 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
TORCH ?= torch==2.13.0
ONNXRUNTIME ?= onnxruntime==1.31.1
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo stop test lint soak test-docker clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.installed ## Create .venv and install pinned dependencies

$(VENV)/.installed: pyproject.toml requirements.lock
	@[ -n "$(PYTHON)" ] || { echo "Tapeout needs Python 3.11, 3.12 or 3.13; install one, or name it: make PYTHON=/path/to/python"; exit 1; }
	@[ "$$(df -Pk . | awk 'NR==2 {print $$4}')" -gt 4000000 ] || { echo "Less than 4 GB is free here; make room first."; exit 1; }
	@echo "Setting up .venv with $(PYTHON) (some minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock "$(ONNXRUNTIME)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[demo,dev]'
	@$(BIN)/python -m runtime.execution.native
	@touch $@

demo: setup ## Run the main job end to end; leaves the console running
	@$(BIN)/python -m demo

stop: ## Stop what `make demo` left running
	@[ ! -x $(BIN)/python ] || $(BIN)/python -m demo stop

test: setup ## Run every test this machine can run
	@bash tests/run.sh

lint: setup ## Format, then check style, types and layers
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .
	@$(BIN)/pyright
	@$(BIN)/lint-imports

soak: setup ## The long forms of tests, and new examples; SOAK_KILLS, SOAK_SEEDS and others say how long
	@HYPOTHESIS_PROFILE=new $(BIN)/python -m pytest tests -m "hypothesis and not soak" -q -n 2 --dist loadfile
	@HYPOTHESIS_PROFILE=new $(BIN)/python -m pytest tests -m soak -s

test-docker: setup ## The compose file on a real Docker engine
	@bash tests/docker/run.sh

clean: stop ## Remove what `make` made
	@rm -rf $(VENV) .demo .docker-test

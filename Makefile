# Two commands do everything on a fresh machine: `make train` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RECIPE ?= cartpole-ppo arithmetic-grpo
STEPS  ?=
SEED   ?= 1
ARGS   ?=

.PHONY: train test lint check setup clean

train: setup  ## both worlds, one after the other; or one recipe: make train RECIPE=hopper-ppo STEPS=300000
	$(BIN)/upslope train $(RECIPE) --seed $(SEED) $(if $(STEPS),--steps $(STEPS)) $(ARGS)

test: lint  ## everything CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: setup  ## formatting, types and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "upslope needs Python 3.11 or newer; run: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[classic,mujoco,box2d,atari,video,report,tune,language,rewards,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info

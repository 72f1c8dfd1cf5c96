# make reproduce   install into .venv, run the default study, write tables, figures and results/report.html
# make notebooks   run notebooks/results.py on the tables of STUDY, into results/notebooks
# make test        install into .venv and run the tests, with one case of every kind
# make test-all    install into .venv and run every case of every test
# make test-fast   install into .venv and run the quick tests, under two minutes
# make lint        ruff, snakefmt and the import contracts, as the tests also run them
# make docs        install into .venv and build the documentation into results/docs
# make install     install everything into .venv
# make clean       remove .venv, results and what Snakemake keeps
.DEFAULT_GOAL := help
.PHONY: help install reproduce report notebooks test test-all test-fast docs lint clean

PYTHON ?= python3
CORES ?= $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")
STUDY ?= default
BIN := .venv/bin
INSTALLED := .venv/.installed
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false
export NO_MKDOCS_2_WARNING = 1
# The tests start hundreds of processes: each would compile the project's files again where nothing may be kept.
test test-all test-fast: export PYTHONDONTWRITEBYTECODE =

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# One resolver call for everything, so that no package is upgraded behind another's back.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
	  || { echo "error: $(PYTHON) is older than 3.11. Name a newer one: make PYTHON=python3.12 …" >&2; exit 1; }
	@echo "== Installing into .venv: 2 to 5 minutes and 2.5 GB with a CPU build of torch, more with a CUDA build =="
	$(PYTHON) -m venv .venv
	$(BIN)/python workflow/install.py
	@touch $@

install: $(INSTALLED)

reproduce: $(INSTALLED)
	@echo "== Study $(STUDY) on $(CORES) cores; results go to results/ =="
	$(BIN)/python -m cospadi.pipeline.run --cores $(CORES) --config study=$(STUDY)
	$(MAKE) report

report: $(INSTALLED)
	@echo "== Writing results/report.html =="
	$(BIN)/snakemake --cores 1 --config study=$(STUDY) --report results/report.html --quiet

notebooks: $(INSTALLED)
	@mkdir -p results/notebooks
	COSPADI_STUDY=$(STUDY) $(BIN)/jupytext --to ipynb --execute --run-path . --output results/notebooks/$(STUDY).ipynb notebooks/results.py
	@echo "results/notebooks/$(STUDY).ipynb: open it in Jupyter."

test: $(INSTALLED)
	@echo "== Running the tests on $(CORES) cores =="
	$(BIN)/python -m pytest -n $(CORES) --dist loadgroup -m "not thorough"

test-all: $(INSTALLED)
	@echo "== Running every case of every test on $(CORES) cores =="
	$(BIN)/python -m pytest -n $(CORES) --dist loadgroup

test-fast: $(INSTALLED)
	@echo "== Running the quick tests on $(CORES) cores =="
	$(BIN)/python -m pytest -n $(CORES) --dist loadgroup -m "not slow and not thorough"

docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict
	@echo "results/docs/index.html: the pages of docs/ and every setting."

lint: $(INSTALLED)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/snakefmt --check Snakefile workflow && $(BIN)/lint-imports

clean:
	rm -rf .venv results/*/ results/report.html .snakemake

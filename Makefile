# Every target sets up what it needs in .venv. The two that a newcomer needs: make run, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

PARAMETERS = $(if $(EPOCHS),-p 'epochs=$(EPOCHS)') \
	$(if $(BATCH_SIZE),-p 'batch_size=$(BATCH_SIZE)') \
	$(if $(SEED),-p 'seed=$(SEED)') \
	$(if $(TRAIN_SAMPLES),-p 'train_samples=$(TRAIN_SAMPLES)') \
	$(if $(PRECISION),-p 'precision=$(PRECISION)') \
	$(if $(DATASET),-p 'dataset=$(DATASET)') \
	$(if $(RESULTS_DIR),--results-dir '$(RESULTS_DIR)')

.PHONY: help setup run sweep quick jupyter test test-browser bench bench-sweep lint html links lock clean

help:
	@echo 'make run      train every model by papermill, then compare them (some 120 minutes)'
	@echo '              also: EPOCHS= BATCH_SIZE= SEED= TRAIN_SAMPLES= PRECISION= DATASET='
	@echo '              RESULTS_DIR= MODELS="a1 a2 b c c7 d-speed d-accuracy"'
	@echo 'make quick    the same on 1,000 images and 2 epochs (under 5 minutes)'
	@echo 'make sweep    SEEDS=0-4 MODELS="a1 a2": many runs on Dask; SCHEDULER= for a cluster'
	@echo 'make jupyter  open the notebooks in JupyterLab'
	@echo 'make test     run the tests'
	@echo 'make test-browser  try the notebooks in JupyterLab, in Chromium'
	@echo 'make bench    measure speed beside other code (two to five hours); MODELS="a2 a1" ROUNDS=3'
	@echo 'make bench-sweep  measure what a run costs a sweep'
	@echo 'make html     write the notebooks as a static site, in site/'
	@echo 'make links    REPO=owner/name: set the public name that badges lead to'
	@echo 'make lint     check style and format'
	@echo 'make clean    remove .venv'

setup: $(INSTALLED)

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info < (3, 14) or sys.exit("Python 3.10 to 3.13 is needed, for TensorFlow; name one with PYTHON=python3.13")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

run: $(INSTALLED)
	@$(BIN)/python -m mnist_utils run $(if $(MODELS),--models $(MODELS)) $(PARAMETERS)

sweep: $(INSTALLED)
	@$(BIN)/python -m mnist_utils sweep $(if $(MODELS),--models $(MODELS)) \
		$(if $(SEEDS),--seeds '$(SEEDS)') $(if $(SCHEDULER),--scheduler '$(SCHEDULER)') $(PARAMETERS)

quick: EPOCHS := 2
quick: TRAIN_SAMPLES := 1000
quick: run

jupyter: $(INSTALLED)
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-browser: $(INSTALLED)
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && apt-get -qq update && apt-get -qq install --yes chromium >/dev/null; } || \
		{ echo 'Chromium is needed: install it, on Debian with: apt-get install chromium' >&2; exit 1; }
	$(BIN)/python -m pytest -m browser tests/browser

bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement benchmarks/requirements.txt
	$(BIN)/python benchmarks/measure.py $(if $(MODELS),--models $(MODELS)) $(if $(ROUNDS),--rounds $(ROUNDS))

bench-sweep: $(INSTALLED)
	$(BIN)/python benchmarks/many_runs.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

html: $(INSTALLED)
	$(BIN)/python tools/write_html.py

links:
	@$(PYTHON) tools/links.py '$(REPO)'

# Pins what pyproject.toml allows, for every Python that it allows; needs uv.
lock:
	uv pip compile --universal --python-version 3.10 --extra dev --extra sweep --no-annotate --no-header \
		--output-file requirements.txt pyproject.toml

clean:
	rm -rf $(VENV) build *.egg-info

# Every target sets up what it needs in .venv. The two that a newcomer needs: make run, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# By content and place, so that a touched file wants no registry, and a renamed checkout works.
INSTALLED := $(VENV)/installed-$(shell cksum < requirements.txt | tr -d ' ')
LINKED := $(VENV)/linked-$(shell pwd | cksum | tr -d ' ')
PIP := PIP_USER=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check

# A variable as the user typed it, as one word of the shell's, whatever is in it.
quoted = '$(subst ','\'',$(value $(1)))'
parameter = $(if $(value $(1)),-p $(2)=$(call quoted,$(1)))
option = $(if $(value $(1)),$(2) $(call quoted,$(1)))
PARAMETERS = $(call parameter,EPOCHS,epochs) $(call parameter,BATCH_SIZE,batch_size) \
	$(call parameter,TRAIN_SAMPLES,train_samples) $(call parameter,DATASET,dataset) \
	$(call parameter,PRECISION,precision) $(call parameter,KEEP_MODEL,keep_model) \
	$(call option,SEEDS,--seeds) $(call option,RESULTS_DIR,--results-dir) \
	$(call option,SCHEDULER,--scheduler) $(call option,WORKERS,--workers)
NBVAL := $(BIN)/python -m pytest -q -p no:cacheprovider -p no:randomly --nbval --nbval-current-env \
	--nbval-cell-timeout=14400

.PHONY: help setup run quick jupyter validate test test-browser lint types bench html picture links \
	lock clean

help:
	@echo 'make run      train every model by papermill, then compare them'
	@echo '              also: MODELS="a1 a2 b c c7 d e" SEEDS=0-4 EPOCHS= BATCH_SIZE= TRAIN_SAMPLES='
	@echo '              DATASET= PRECISION= KEEP_MODEL= RESULTS_DIR= SCHEDULER= WORKERS='
	@echo 'make quick    the same on 3,000 images (about 5 minutes)'
	@echo 'make jupyter  open the notebooks in JupyterLab; JUPYTER_OPTIONS= for a server'
	@echo 'make validate run the notebooks by papermill, small, and check them by nbval'
	@echo 'make test     run the tests'
	@echo 'make test-browser  try the notebooks in JupyterLab, in Chromium'
	@echo 'make bench    measure speed beside other code; MODELS="a2 a1" ROUNDS=2'
	@echo 'make html     write the notebooks as a static site, in site/'
	@echo 'make picture  make the moving picture of the README from a training'
	@echo 'make links    REPO=owner/name: set the public name that badges lead to'
	@echo 'make lint     check style and format; make types checks the type hints'
	@echo 'make lock     pin the versions anew, in requirements.txt'
	@echo 'make clean    remove .venv'

setup: $(LINKED)

# pip compiles nothing, which saves half the time: Python does, what it uses.
$(INSTALLED):
	@$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info < (3, 14) or sys.exit("Python 3.10 to 3.13 is needed, for TensorFlow; name one with PYTHON=python3.13")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-compile --requirement requirements.txt
	@rm -f $(VENV)/installed-* $(VENV)/linked-*
	@touch $@

$(LINKED): $(INSTALLED)
	$(PIP) --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/linked-*
	@touch $@

run: setup
	@$(BIN)/python -m mnist_utils run $(if $(MODELS),--models $(MODELS)) $(PARAMETERS)

quick: EPOCHS = 4
quick: BATCH_SIZE = 16
quick: TRAIN_SAMPLES = 3000
quick: DATASET = mnist-small
quick: run

jupyter: setup
	$(BIN)/python -m jupyterlab --LabApp.default_url=/lab/tree/notebooks $(JUPYTER_OPTIONS)

# As a user's own CI would: papermill with small parameters, nbval over what came out, and
# strictly over the comparison, of the reference runs alone.
PAPERMILL := $(BIN)/python -m papermill --kernel python3 --log-level WARNING --no-progress-bar
SMALL := -p epochs 1 -p batch_size 64 -p dataset mnist-small -p train_samples 640
validate: setup
	rm -rf runs/validate && mkdir -p runs/validate/notebooks runs/validate/none
	printf '%s\n' notebooks/*_model_*.ipynb | xargs -P 2 -I % $(PAPERMILL) $(SMALL) \
		-p results_dir $(call quoted,CURDIR)/runs/validate/runs % runs/validate/%
	$(PAPERMILL) notebooks/7_your_digits.ipynb runs/validate/notebooks/7_your_digits.ipynb
	$(NBVAL) --numprocesses 2 --dist loadfile --nbval-sanitize-with tests/nbval_sanitize.cfg \
		runs/validate/notebooks/*.ipynb
	MNIST_UTILS_RESULTS=runs/validate/none $(NBVAL) notebooks/8_comparison.ipynb

# Three, though there may be two cores: tests wait for kernels and workers.
test: setup
	$(BIN)/python -m pytest --numprocesses 3 --dist worksteal

test-browser: setup
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && apt-get -qq update && apt-get -qq install --yes chromium >/dev/null; } || \
		{ echo 'Chromium is needed: install it, on Debian with: apt-get install chromium' >&2; exit 1; }
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m browser tests/browser

lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: setup
	$(BIN)/python -m mypy mnist_utils tools

bench: setup
	$(PIP) --requirement benchmarks/requirements.txt
	$(BIN)/python benchmarks/measure.py $(if $(MODELS),--models $(MODELS)) $(if $(ROUNDS),--rounds $(ROUNDS))

html: setup
	$(BIN)/python tools/write_html.py

picture: setup
	$(BIN)/python tools/moving_picture.py

links:
	@$(PYTHON) tools/links.py $(call quoted,REPO)

# Pins what pyproject.toml allows, for every Python that it allows; needs uv.
lock:
	uv pip compile --universal --python-version 3.10 --extra dev --no-annotate --no-header \
		--output-file requirements.txt pyproject.toml

clean:
	rm -rf $(VENV) build *.egg-info

# make demo   install into .venv, quantize the bundled checkpoint, let it answer
# make test   install the test tools too, run the whole suite
# make test-models   every architecture in every format and by every method, the trained model where it is: minutes
# make test-levels   the whole suite at every instruction level of this processor, with one thread and with two
#
# VENV=.venv          where everything is installed
# PYTHON=python3      the interpreter that makes the venv (3.11 or newer)
# PIP_ARGS=           extra arguments for pip, e.g. an --index-url that serves CPU-only torch wheels
# WORKERS=            "" runs the tests one after another; by default files share the cores
# PYTEST_ARGS=        extra arguments for pytest, e.g. -k store

VENV ?= .venv
PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
# In the order of the files: by default xdist leaves files of few tests to the end, and some of these take minutes.
WORKERS ?= -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

PIP := $(VENV)/bin/python -m pip install --quiet -c constraints.txt $(PIP_ARGS)
QMIX := $(VENV)/bin/qmix
DEMO_STORE := build/demo

.PHONY: demo test pytest test-models test-levels lint ruff mypy clean

demo: $(VENV)/.qmix
	$(QMIX) quantize qmix/demo/checkpoint $(DEMO_STORE) --force
	$(QMIX) generate $(DEMO_STORE) -p "Tell me a story about a fox and a lantern." --temp 0 -n 200
	$(QMIX) generate $(DEMO_STORE) -p "What is a Mixture-of-Experts model?" --temp 0 -n 120
	@echo "Talk to it: $(QMIX) chat $(DEMO_STORE)"

# mypy has one core for itself or less, and the tests wait now and then: together they take less time.
test: $(VENV)/.qmix-dev ruff
	$(MAKE) --no-print-directory -j 2 mypy pytest

pytest: $(VENV)/.qmix-dev
	$(VENV)/bin/python -m pytest $(WORKERS) $(PYTEST_ARGS)

test-models: $(VENV)/.qmix-dev
	$(VENV)/bin/python -m pytest $(WORKERS) $(PYTEST_ARGS) -m models

test-levels: $(VENV)/.qmix-dev
	$(VENV)/bin/python tests/levels.py $(WORKERS) $(PYTEST_ARGS)

lint: ruff mypy

ruff: $(VENV)/.qmix-dev
	$(VENV)/bin/ruff check .

mypy: $(VENV)/.qmix-dev
	$(VENV)/bin/mypy

# The stamps make each install happen once, and again only when what to install changed.
NATIVE := $(wildcard qmix/kernels/native/*.[ch])

$(VENV)/.qmix: pyproject.toml setup.py constraints.txt $(NATIVE)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.qmix-dev: $(VENV)/.qmix
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info

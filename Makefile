# Everything runs in .venv, which `make setup` (or the first target that needs it) creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
GADGETRON_VENV := .venv-gadgetron

.PHONY: setup demo test test-gadgetron check bench wheel clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

demo: setup
	mkdir -p demo
	$(BIN)/voxelsigma simulate -o demo/scan.h5 --matrix 160x160 --coils 8 --acceleration 4 --mask random_1d
	$(BIN)/voxelsigma replay demo/scan.h5 -p unrolled_sigma.xml -o demo/out.h5
	$(BIN)/voxelsigma picture demo/out.h5 -o demo/sigma.png
	@echo "The images and maps are in demo/out.h5 (ISMRMRD), the picture is demo/sigma.png:"
	@echo "the reconstruction, its noise standard deviation, their quotient (SNR), and the noise against full sampling."

# one process a core, one thread each: more threads only wait for each other
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

test-gadgetron: $(GADGETRON_VENV)/.installed
	OMP_NUM_THREADS=1 $(GADGETRON_VENV)/bin/pytest -n auto --dist loadfile --no-loadscope-reorder tests/gadgets tests/formats

$(GADGETRON_VENV)/.installed: pyproject.toml constraints-gadgetron.txt
	$(PYTHON) -m venv $(GADGETRON_VENV)
	$(GADGETRON_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(GADGETRON_VENV)/bin/python -m pip install --quiet --constraint constraints-gadgetron.txt --editable . pytest pytest-xdist hypothesis matplotlib nibabel
	touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m bench

wheel: setup
	PYTHON=$(PYTHON) .ci/check-wheel

clean:
	rm -rf $(VENV) $(GADGETRON_VENV) build dist demo src/*.egg-info

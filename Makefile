# Needs Python 3.11 or newer and make. `make demo` and `make test` do all the rest.
PYTHON ?= python3.11
BIN := .venv/bin

demo: .venv/ready  ## run the main job: a sweep of gamma on handwritten digits
	$(BIN)/python examples/gamma_sweep.py

test: .venv/ready  ## every test that needs no accelerator
	$(BIN)/pytest

frameworks: .venv/frameworks  ## the libraries that the tests then compare with

test-lowest: .venv-lowest/ready  ## the same with the oldest versions that are allowed
	.venv-lowest/bin/pytest

bench: .venv/ready  ## ratios to the alternatives, in one run
	$(BIN)/python -m benchmarks

lint: .venv/ready  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv/ready  ## pages from the docstrings, in docs/api
	$(BIN)/pdoc --docformat google --output-directory docs/api \
	  jax_rmsprop jax_rmsprop.conventions jax_rmsprop.migrate jax_rmsprop.storage jax_rmsprop.plotting

pictures: .venv/ready  ## draw again the pictures that the README shows
	for name in trajectory_2d leaky_average airfoil exercises gamma_sweep \
	  port_from_pytorch low_precision_state population_training; do \
	  $(BIN)/python examples/$$name.py --output docs/images/$$name.png || exit 1; \
	done

clean:
	rm -rf .venv .venv-lowest build dist docs/api

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[all]"
	touch $@

# Those of the second file need more than the tests do, or name another build.
.venv/frameworks: .venv/ready tests/frameworks.txt tests/frameworks-alone.txt
	$(BIN)/python -m pip install --quiet --requirement tests/frameworks.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement tests/frameworks-alone.txt
	touch $@

.venv-lowest/ready: pyproject.toml tests/lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --editable ".[all]" --constraint tests/lowest.txt
	touch $@

.PHONY: demo test frameworks test-lowest bench lint docs pictures clean

# Needs Python 3.11 or newer and make. `make demo` and `make test` do all the rest.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The newest on the path that runs.
NEWEST_PYTHON ?= $(shell for n in $$(seq 30 -1 11); do \
  python3.$$n -c "" 2> /dev/null && command -v python3.$$n && break; done)
BIN := .venv/bin

demo: .venv/ready  ## run the main job: a sweep of gamma on handwritten digits
	$(BIN)/python examples/gamma_sweep.py

test: .venv/ready  ## every test that needs no accelerator
	$(BIN)/pytest

frameworks: .venv/frameworks  ## the libraries that the tests then compare with

test-lowest: .venv-lowest/ready  ## the same with the oldest versions that are allowed
	.venv-lowest/bin/pytest

test-newest: .venv-newest/ready  ## the same with the newest of all, on NEWEST_PYTHON
	.venv-newest/bin/pytest

test-switches: .venv/ready  ## the interface under each of JAX's own switches
	$(BIN)/pytest --switches tests/test_interface.py

# JAX reads these before it is imported; TPUs are not asked for, only their compiler.
# EVERY_STEP=1: also a training step with each optimizer, eight minutes more.
accelerators: .venv-accelerators/ready  ## the step as TPUs' and GPUs' compilers make it
	EVERY_STEP=$(EVERY_STEP) JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 \
	  .venv-accelerators/bin/pytest tests/test_compiled.py

bench: .venv/ready  ## ratios to the alternatives, in one run
	$(BIN)/python -m benchmarks

lint: .venv/ready  ## style, types, spelling, and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/codespell
	$(BIN)/lint-imports

types-newest: .venv-newest/ready  ## types, as the newest libraries declare them
	.venv-newest/bin/pyright --pythonpath .venv-newest/bin/python

types-lowest: .venv-lowest/ready  ## types, as the oldest libraries declare them
	.venv-lowest/bin/pyright --pythonpath .venv-lowest/bin/python

docs: .venv-docs/ready  ## the site, in docs/_build/html; a warning is an error
	rm -rf docs/_build
	.venv-docs/bin/sphinx-build -W --keep-going -q -b html $(SPHINXOPTS) docs docs/_build/html
	.venv-docs/bin/pytest -o addopts= -q docs/test_site.py $(SITE_TESTS)

# The second build must be the first, byte for byte.
package: .venv/ready  ## sdist and wheel for a release, in dist, checked
	rm -rf dist
	$(BIN)/python -m build --outdir dist > /dev/null
	$(BIN)/python -m build --outdir dist/again > /dev/null
	cd dist && sha256sum *.whl *.tar.gz > SHA256SUMS && cd again && sha256sum --check ../SHA256SUMS
	rm -r dist/again
	$(BIN)/twine check --strict dist/*.whl dist/*.tar.gz
	$(BIN)/check-wheel-contents dist/*.whl
	tar --list --file dist/*.tar.gz

pictures: .venv/ready  ## draw what README and explanations show; look at it
	$(BIN)/python examples/gamma_sweep.py --output docs/images/gamma_sweep.png
	$(BIN)/python docs/gallery.py

clean:
	rm -rf .venv .venv-accelerators .venv-docs .venv-lowest .venv-newest build dist \
	  docs/_build docs/tutorials docs/reference/generated

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[all]"
	touch $@

# Those of the second file need more than the tests do, or name another build.
.venv/frameworks: .venv/ready tests/frameworks.txt tests/frameworks-alone.txt
	$(BIN)/python -m pip install --quiet --requirement tests/frameworks.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement tests/frameworks-alone.txt
	touch $@

.venv-newest/ready: pyproject.toml
	$(NEWEST_PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[all]"
	touch $@

.venv-docs/ready: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --editable ".[docs]"
	touch $@

.venv-lowest/ready: pyproject.toml tests/lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --editable ".[all]" --constraint tests/lowest.txt
	touch $@

.venv-accelerators/ready: pyproject.toml tests/accelerators.txt
	$(PYTHON) -m venv .venv-accelerators
	.venv-accelerators/bin/python -m pip install --quiet --editable . --requirement tests/accelerators.txt
	touch $@

.PHONY: demo test frameworks accelerators test-lowest test-newest test-switches bench lint docs \
  package pictures types-lowest types-newest clean

# Needs Python 3.11 or newer and make; `make demo` and `make test` do all the rest.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The newest on the path that runs.
NEWEST_PYTHON ?= $(shell for n in $$(seq 30 -1 11); do \
  python3.$$n -c "" 2> /dev/null && command -v python3.$$n && break; done)
BIN := .venv/bin
PYTEST := pytest --numprocesses=logical --maxprocesses=4 --dist=worksteal
MARKS ?= not slow and not exhaustive

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/examples  ## sweep gamma on handwritten digits, and draw the picture
	$(BIN)/python examples/gamma_sweep.py

test: .venv/ready  ## the tests; MARKS="not exhaustive" adds the slow ones, MARKS= all
	$(BIN)/$(PYTEST) -m "$(MARKS)"

check: .venv/lint  ## before each commit: style, types of what changed, a minute of tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@changed=$$(git diff --name-only --diff-filter=d HEAD -- 'jax_rmsprop/*.py'); \
	  if [ -n "$$changed" ]; then $(BIN)/pyright --pythonpath $(BIN)/python $$changed; fi
	$(BIN)/$(PYTEST) $(addprefix tests/test_,equations.py transform.py optimizer.py \
	  interface.py validate.py properties.py members.py sweep.py)

format: .venv/lint  ## sort imports and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: .venv/lint  ## style, types, spelling, and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/codespell
	$(BIN)/lint-imports

coverage: .venv/ready  ## which lines of the package no test runs
	$(BIN)/$(PYTEST) -m "$(MARKS)" --cov --cov-report=term-missing:skip-covered

mutants: .venv/ready  ## change the code, one operator at a time: which test notices?
	$(BIN)/python -m tests.mutants

bench: .venv/ready  ## ratios to the alternatives, in one run
	$(BIN)/python -m benchmarks

pictures: .venv/ready  ## draw the pictures of README and the pages; check them by eye
	$(BIN)/python docs/gallery.py

docs: .venv-docs/ready  ## the site, in docs/_build/html; a warning is an error
	rm -rf docs/_build
	.venv-docs/bin/sphinx-build -W --keep-going -q -b html $(SPHINXOPTS) docs docs/_build/html
	.venv-docs/bin/pytest -q docs/test_site.py $(SITE_TESTS)

inventories:  ## fetch what links to JAX, Optax and xarray need, into docs/inventories
	mkdir -p docs/inventories
	curl -fsSL https://docs.jax.dev/en/latest/objects.inv -o docs/inventories/jax.inv
	curl -fsSL https://optax.readthedocs.io/en/latest/objects.inv -o docs/inventories/optax.inv
	curl -fsSL https://docs.xarray.dev/en/stable/objects.inv -o docs/inventories/xarray.inv

frameworks: .venv/frameworks  ## the libraries that the tests then compare with, 3 GB

test-lowest: .venv-lowest/ready  ## the tests with the oldest versions that are allowed
	.venv-lowest/bin/$(PYTEST) -m "$(MARKS)"

test-newest: .venv-newest/ready  ## the tests with the newest versions, on NEWEST_PYTHON
	.venv-newest/bin/$(PYTEST) -m "$(MARKS)"

types-newest: .venv-newest/ready  ## types, as the newest libraries declare them
	.venv-newest/bin/pyright --pythonpath .venv-newest/bin/python

types-lowest: .venv-lowest/ready  ## types, as the oldest libraries declare them
	.venv-lowest/bin/pyright --pythonpath .venv-lowest/bin/python

# JAX reads these before it is imported; TPUs are not asked for, only their compiler.
# EVERY_STEP=1: also a training step with each optimizer, eight minutes more.
accelerators: .venv-accelerators/ready  ## the step as TPUs' and GPUs' compilers make it
	EVERY_STEP=$(EVERY_STEP) JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 \
	  .venv-accelerators/bin/$(PYTEST) tests/test_compiled.py

# The second build must be the first, byte for byte.
package: .venv/release  ## sdist and wheel for a release, in dist, checked
	rm -rf dist
	$(BIN)/python -m build --outdir dist > /dev/null
	$(BIN)/python -m build --outdir dist/again > /dev/null
	cd dist && sha256sum *.whl *.tar.gz > SHA256SUMS && cd again && sha256sum --check ../SHA256SUMS
	rm -r dist/again
	$(BIN)/twine check --strict dist/*.whl dist/*.tar.gz
	$(BIN)/check-wheel-contents dist/*.whl
	tar --list --file dist/*.tar.gz

clean:  ## delete everything these commands created, caches included
	rm -rf .venv .venv-accelerators .venv-docs .venv-lowest .venv-newest .cache build dist \
	  docs/_build docs/tutorials docs/reference/generated

# uv installs in seconds what takes pip minutes. Where it can't be had, a pip that knows
# groups takes the same words.
define environment
	$(2) -m venv $(1)
	$(1)/bin/python -m pip install --quiet uv || $(1)/bin/python -m pip install --quiet --upgrade pip
endef
install = $$(test -x $(1)/bin/uv && echo "$(1)/bin/uv pip install --python $(1)/bin/python" \
  || echo "$(1)/bin/python -m pip install") --quiet

.venv/made:
	$(call environment,.venv,$(PYTHON))
	touch $@

.venv/examples: .venv/made pyproject.toml
	$(call install,.venv) --editable ".[examples]"
	touch $@

.venv/ready: .venv/made pyproject.toml
	$(call install,.venv) --editable ".[cluster,examples]" --group test
	touch $@ .venv/examples

.venv/lint: .venv/ready
	$(call install,.venv) --group lint
	touch $@

.venv/release: .venv/made pyproject.toml
	$(call install,.venv) --group release
	touch $@

# Of PyTorch pip takes a build without CUDA where the machine has one. The packages of
# the second file need more than the tests do, or name another build.
.venv/frameworks: .venv/ready tests/frameworks.txt tests/frameworks-alone.txt
	$(BIN)/python -m pip install --quiet $$(grep ^torch== tests/frameworks.txt)
	$(call install,.venv) --requirement tests/frameworks.txt
	$(call install,.venv) --no-deps --requirement tests/frameworks-alone.txt
	touch $@

.venv-newest/ready: pyproject.toml
	$(call environment,.venv-newest,$(NEWEST_PYTHON))
	$(call install,.venv-newest) --upgrade --editable ".[cluster,examples]" --group test --group lint
	touch $@

.venv-docs/ready: pyproject.toml
	$(call environment,.venv-docs,$(PYTHON))
	$(call install,.venv-docs) --editable ".[cluster,examples]" --group docs
	touch $@

.venv-lowest/ready: pyproject.toml tests/lowest.txt
	$(call environment,.venv-lowest,$(PYTHON))
	$(call install,.venv-lowest) --editable ".[cluster,examples]" --group test --group lint \
	  --constraint tests/lowest.txt
	touch $@

.venv-accelerators/ready: pyproject.toml tests/accelerators.txt
	$(call environment,.venv-accelerators,$(PYTHON))
	$(call install,.venv-accelerators) --editable . --requirement tests/accelerators.txt
	touch $@

.PHONY: help demo test check format lint coverage mutants bench pictures docs frameworks \
  test-lowest test-newest types-newest types-lowest accelerators package clean inventories

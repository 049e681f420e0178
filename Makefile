# make test | lint | demo; the first call builds .venv. PYTHON=python3.12 picks another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The torch that the tests are developed against; users get any torch that pyproject.toml allows.
TORCH ?= torch==2.13.0

.PHONY: .venv test lint format demo docs package

.venv: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("dha_peft needs Python 3.11 or newer; set PYTHON." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)' || $(PIP) 'torch>=2.8'
	$(PIP) -e '.[dev]'
	@touch $@

test: .venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --dist loadfile

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: .venv
	$(BIN)/python examples/demo.py

docs: .venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Wheel and sdist, each installed without any extra into an environment of its own, where the command must work.
package: .venv
	rm -rf dist build
	$(BIN)/python -m build --no-isolation
	for file in dist/*.whl dist/*.tar.gz; do \
		$(PYTHON) -m venv --clear build/clean && build/clean/bin/python -m pip install --quiet $$file && \
		(cd build && clean/bin/dha env && clean/bin/dha plan ../examples/demo_model) || exit 1; \
	done

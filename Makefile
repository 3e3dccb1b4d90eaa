# Every target sets up .venv by itself; nothing else is needed but Python 3.10 to 3.13 with venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint bench clean

# A chest X-ray classifier from nothing: phantoms, shards, a short training run, its scores.
demo: $(READY)
	$(BIN)/python scripts/make_phantoms.py data/phantoms
	$(BIN)/python scripts/make_shards.py data/phantoms data/phantom-shards
	$(BIN)/python -m trainer --arch custom_cnn --shards data/phantom-shards --name demo \
	    --batch-size 32 --lr 1e-3 --epochs 18 --patience 3
	$(BIN)/python -m eval demo

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks.loader

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv data/phantoms data/phantom-shards runs/demo

# Every target sets up .venv by itself; nothing else is needed but Python 3.10 to 3.13 with venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PIP := -m pip install --quiet --disable-pip-version-check
# With stdout closed, as by `make test >&-`, make, pip and pytest would fail for want of it.
OPEN := @(true 3>&1) 2>/dev/null || exec >/dev/null;
# One test process per core, each with one thread: torch's own threads would wait for one another. At most
# eight, since each holds torch in its memory.
PYTEST := $(OPEN) OMP_NUM_THREADS=1 \
    $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: demo test quick test-latest gpu-check lint bench lock clean

# A chest X-ray classifier from nothing: phantoms, shards, a short training run, its scores.
demo: $(READY)
	$(BIN)/python scripts/make_phantoms.py data/phantoms
	$(BIN)/python scripts/make_shards.py data/phantoms data/phantom-shards
	$(BIN)/python -m trainer --arch custom_cnn --shards data/phantom-shards --name demo \
	    --batch-size 32 --lr 1e-3 --epochs 18 --patience 3
	$(BIN)/python -m eval demo

test: $(READY)
	$(PYTEST)

# The inner loop: the tests that train nothing and start no process.
QUICK := test_architecture.py test_readme.py models eval/scores loaders/test_sampler.py loaders/test_collate.py \
    trainer/test_step.py trainer/test_stopping.py $(addprefix trainer/optim/test_,ema.py losses.py schedules.py) \
    $(addprefix shards/test_,csv_tables.py documents.py entries.py findings.py formulas.py index.py manifest.py \
    pixels.py planning.py png.py splits.py)
quick: $(READY)
	$(PYTEST) $(addprefix tests/,$(QUICK))

# The tests with the newest release of every dependency instead of the locked ones.
test-latest:
	$(PYTHON) -m venv --clear .venv-latest
	.venv-latest/bin/python $(PIP) --editable '.[cuda13,dev]'
	$(MAKE) test BIN=.venv-latest/bin READY=.venv-latest

# On a machine with a GPU: the tests that need one, and in five minutes what it reaches beside what was estimated.
gpu-check: $(READY)
	$(OPEN) CXRAPID_GPU=1 $(BIN)/python -m pytest -m cuda tests/gpu
	$(OPEN) $(BIN)/python -m benchmarks.gpu matrix --minutes 5

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks.loader

# Needs uv. Take new releases up with it, then run `make test`.
lock:
	uv pip compile setup.cfg --extra cuda13 --extra dev --universal --python-version 3.10 --upgrade \
	    --generate-hashes --no-emit-index-url --no-annotate --no-header --output-file requirements.lock

$(READY): requirements.lock setup.cfg pyproject.toml
	$(OPEN) echo 'installing into .venv, which takes minutes the first time'; $(PYTHON) -m venv .venv
	$(OPEN) $(BIN)/python $(PIP) --require-hashes --requirement requirements.lock
	$(OPEN) $(BIN)/python $(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf .venv .venv-latest data/phantoms data/phantom-shards runs/demo

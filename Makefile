# Every target sets up .venv by itself on a fresh machine; nothing is asked.
PYTHON ?= python3
VENV ?= .venv
READY = $(VENV)/.ready
BIN = $(VENV)/bin

.PHONY: test check demo bench gpu clean

$(READY): requirements/install.sh $(wildcard requirements/*.txt) setup.py
	PYTHON=$(PYTHON) bash requirements/install.sh $(VENV)
	touch $(READY)

test: $(READY)
	$(BIN)/python -m pytest -q --durations=15 -n 2 --dist loadfile --no-loadscope-reorder -p no:benchmark

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -k "not readme_commands_run" tests/test_docs.py tests/test_import.py

demo: $(READY)
	$(BIN)/moe-runtime demo

bench: $(READY)
	$(BIN)/python -m benchmarks run

# everything that needs a GPU, in ten minutes; without one it says so
gpu: $(READY)
	PYTHONPATH=.:kernels $(BIN)/python -m benchmarks.gpu_round

clean:
	rm -rf $(VENV) .cache runs build

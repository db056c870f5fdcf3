# All targets but test-gpu need CPython 3.11, gcc and pip, and build the rest into .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

.PHONY: demo demo-tabular serve test test-gpu ui clean

demo: $(STAMP)
	$(BIN)/python pipelines/demo.py

demo-tabular: $(STAMP)
	$(BIN)/python pipelines/demo_tabular.py

serve: $(STAMP)
	$(BIN)/python pipelines/serve.py

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@# Two processes fill two cores: threads beside them would wait for each other.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope

# In PYTHON as it is: the torch and Triton of a GPU machine are its own. Most of the time compiles.
GPU_PROCESSES ?= 8
test-gpu:
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
		|| { echo "test-gpu needs torch with a CUDA device: make test-gpu PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m pytest tests/kernels tests/models/test_cuda.py tests/models/test_compiled.py -m gpu \
		-n $(GPU_PROCESSES) --dist worksteal -p no:cacheprovider -p no:benchmark

ui: $(STAMP)
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db --workers 1

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
		|| { echo "hashtab needs CPython 3.11 to 3.13: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev,demo]'
	@# On all cores, which pip does not: of what is for newer Pythons, nothing is said.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

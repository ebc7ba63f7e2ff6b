# Every target works on a fresh machine with Python >= 3.10: the environment is made when missing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
# Test processes: one for each core of a small machine.
JOBS ?= 2

.PHONY: demo quick test slow fuzz accuracy mutants matrix codegen ptx ttsem sanitize lint docs bench traffic gpu rehearsal clean

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -qq --no-compile --disable-pip-version-check --editable ".[dev]"
	touch $(READY)

demo: $(READY)  ## dense, token-wise and segment-wise forecasters on one series
	$(RUN) examples/train_forecaster.py --demo

# Each stage's kernels against the reference in float64, beside the tests of the reference itself.
QUICK := $(addprefix tests/test_,layering.py reference.py reference_edges.py layer.py validation.py \
	route.py::test_route_equals_reference_in_float64 \
	route.py::test_route_gives_ties_to_the_lowest_expert \
	permute.py::test_permute_at_block_boundaries \
	experts.py::test_expert_ffn_equals_reference_in_float64 \
	grouped_gemm.py::test_grouped_gemm_equals_reference_in_float64 \
	combine.py::test_combine_equals_reference_in_float64 \
	shared.py::test_shared_combine_equals_reference_in_float64 \
	triton_layer.py::test_layer_equals_reference_in_float64)

quick: $(READY)  ## tests of a minute or two: is all well with this change?
	$(RUN) -m pytest -q -m "not slow" -n $(JOBS) --dist worksteal $(QUICK)

test: $(READY)  ## the tests that need no GPU
	$(RUN) -m pytest -q -m "not slow" -n $(JOBS) --dist worksteal

slow: $(READY)  ## those that take minutes: packaging, pictures, every kind of export
	$(RUN) -m pytest -q -m slow -n $(JOBS) --dist worksteal

fuzz: $(READY)  ## 5,000 random layers, both backends against float64; writes tests/reports/fuzz.md
	$(RUN) tests/fuzz.py

accuracy: $(READY)  ## errors of every output and gradient, many runs; writes tests/reports/accuracy.md
	$(RUN) tests/accuracy.py

mutants: $(READY)  ## faults planted by rule, which tests have to notice; tests/reports/mutation.md
	$(RUN) tests/mutate.py

matrix: $(READY)  ## core tests with each release of torch and triton; writes tests/reports/versions.md
	$(RUN) tests/matrix.py

codegen: $(READY)  ## registers and spills of what changed; writes benchmarks/results/codegen/
	for arch in sm_90 sm_80; do $(RUN) -m benchmarks.codegen --brief --arch $$arch \
		--json benchmarks/results/codegen/$$arch.json || exit 1; done

ptx: $(READY)  ## compiled kernels of every layer, executed without a GPU; writes tests/reports/ptx.md
	$(RUN) tests/ptx_layers.py --jobs $(JOBS)
	$(RUN) tests/ptx_faults.py

# Without its dependencies, into a folder of its own: it asks for newer releases than it needs. The
# script says it where this failed.
ttsem: $(READY)  ## the same layers as Triton's IR, by a library from PyPI; writes tests/reports/ttsem.md
	-$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python \
		--upgrade --target build/ttsem ttsem==0.1
	PYTHONPATH=build/ttsem $(RUN) tests/ttsem_layers.py

lint: $(READY)  ## style, types and all other rules of .pre-commit-config.yaml
	if git rev-parse --is-inside-work-tree > /dev/null 2>&1; then \
		PATH="$(abspath $(VENV))/bin:$$PATH" $(RUN) -m pre_commit run --all-files --show-diff-on-failure; \
	else $(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy; fi  # no repository

docs: $(READY)  ## pages and API reference; begin at build/docs/index.html
	$(RUN) -m docs.pictures
	$(RUN) -m sphinx -q -W --keep-going -c docs . build/docs
	@echo build/docs/index.html

bench: $(READY)  ## microbenchmarks of stages and layer; a minute for the reference on a CPU
	$(RUN) -m pytest benchmarks -q --benchmark-only --benchmark-autosave \
		--benchmark-columns=min,median,iqr,rounds $(ARGS)

traffic: $(READY)  ## bytes and launches of every kernel beside ScatterMoE's
	$(RUN) -m benchmarks.traffic

# The machine with the GPU has its own torch and triton, so no environment is made for either; the
# rehearsal takes the same ones, for it compiles the kernels.
gpu:  ## all that needs a GPU, in 12 minutes; to $OUT, else benchmarks/results/<device>/
	$(PYTHON) -m benchmarks.gpu

rehearsal:  ## the same without a GPU and without arithmetic; compiles the kernels for it
	$(PYTHON) -m benchmarks.gpu rehearse

sanitize:  ## the kernels under compute-sanitizer; needs a GPU, and writes where gpu does
	$(PYTHON) tests/sanitize.py

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

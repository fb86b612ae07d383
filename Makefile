# The two commands of the README are `make demo` and `make test`. Both make .venv first; the second time that takes no time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NATIVE := $(shell find native -type f)
PLAYED := $(shell find src/hasten/backends/cpu src/hasten/program src/hasten/formats -name '*.py')
# torch comes first and from the constraints file: any looser requirement may pull gigabytes of CUDA.
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

define DEMO
class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __repr__(self):
        return
endef
export DEMO

.PHONY: demo test lint bench gpu evidence sanitize determinism kill load requests fuzz tenants quantize soak clean

demo: $(VENV)/.installed
	@$(BIN)/hasten inspect code-8m
	@echo && echo "code-8m goes on where this class stops:" && echo
	@$(BIN)/hasten generate code-8m --echo --max-tokens 41 --repetition-penalty 1.1 --prompt "$$DEMO"

# What bounds times comes last and alone. Other guests of the machine may be in its way, so it has three tries; nothing else has.
test: $(VENV)/.tested $(VENV)/.scraper
	@$(BIN)/python -m pytest -m 'not timed' --numprocesses 2 --durations 10
	@$(BIN)/python -m pytest -m timed --reruns 2 --durations 10

lint: $(VENV)/.tested
	@$(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports

# The table of measured figures; needs a quiet machine.
bench: $(VENV)/.tested
	@$(BIN)/python benchmarks/training_step.py

# All that only a GPU can show, in under nine minutes; writes docs/gpu.md. Says what is missing where there is none.
gpu: $(VENV)/.tested
	@$(BIN)/python -m benchmarks.gpu $(ARGS)

# The measured tables: all that this machine can show, each line once until what runs changes. ARGS=--help says how to run some of it.
evidence: $(VENV)/.tested
	@$(PIP) cmake ninja nanobind
	@$(BIN)/python -m benchmarks.evidence $(ARGS)

# The native tests with every read, write and overflow checked, the pool's threads with every hand-over checked. Goes on where it stopped.
CHECKED        := build/sanitize
CHECKED_TESTS  := $(wildcard tests/ops/test_native*.py) $(addprefix tests/,ops/test_stored.py ops/test_cpu_backend.py engine/test_sampler.py \
	engine/test_determinism.py families/test_native.py)
library         = $(shell $(or $(CXX),c++) -print-file-name=$(1))
CHECKED_PYTHON  = LD_PRELOAD=$(call library,libasan.so):$(call library,libubsan.so):$(call library,libstdc++.so.6) \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	HASTEN_SANITIZED="$$(echo $(CHECKED)/_native*.so)" $(BIN)/python

sanitize: $(CHECKED)/.fires $(CHECKED)/.threads $(CHECKED_TESTS:%=$(CHECKED)/%.passed)

# What takes too long for every change, each part once until what it reads changes; a run that was stopped goes on where it was.
soak: determinism kill load sanitize requests fuzz tenants quantize

# The determinism contract over {bf16, W8A8, W4A8} x {grouped-query, multi-query, window, MoE} x {bf16, int8 cache}, 200 prompts each, and
# over what the engine does (batches, places, chunks, prefixes, preemption, swaps), 1,000 prompts each.
determinism: $(VENV)/.tested
	@$(BIN)/python -m tests.soak determinism engine

# 50 engines killed under 64 streams each: every client is told within a second, others are sent away, and the next engine answers.
kill: $(VENV)/.tested
	@$(BIN)/python -m tests.soak kill

# A thousand idle sockets, bombs, hostile neighbours, a thousand clients that go away, ten times too much work for ten minutes, and ten ends
# under 64 streams: what the server must hold, each in figures.
load: $(VENV)/.tested
	@$(BIN)/python -m tests.soak slowloris bombs neighbours disconnects overload drain

# 10,000 malformed requests; 1,000 pairs in which one tenant tries to tell what another has asked; 10,000 simulated runs of the scheduler;
# `hasten quantize` killed at ten points and gone on with.
requests tenants quantize: $(VENV)/.tested
	@$(BIN)/python -m tests.soak $@

# An hour of processor time for each target, guided by what runs.
fuzz: $(VENV)/.tested
	@$(PIP) atheris
	@$(BIN)/python -m tests.soak fuzz --ledger tests/soak/fuzzed.jsonl

$(CHECKED)/.built: $(VENV)/.tested $(NATIVE)
	@$(PIP) cmake ninja nanobind
	@PATH="$(abspath $(BIN)):$$PATH" cmake -S native -B $(CHECKED) -G Ninja -DHASTEN_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
		-DPython_EXECUTABLE="$(abspath $(BIN)/python)" > /dev/null
	@PATH="$(abspath $(BIN)):$$PATH" cmake --build $(CHECKED) && touch $@

# A planted fault of each kind must be found, or silence would mean nothing.
$(CHECKED)/.fires: $(CHECKED)/.built tests/sanitized.py
	@$(CHECKED_PYTHON) -m tests.sanitized 2>&1 | grep -q 'AddressSanitizer: use-after-poison'
	@setarch --addr-no-randomize $(CHECKED)/race on-purpose 2>&1 | grep -q 'ThreadSanitizer: data race'
	@touch $@

$(CHECKED)/.threads: $(CHECKED)/.built
	@TSAN_OPTIONS=halt_on_error=1 setarch --addr-no-randomize $(CHECKED)/race && touch $@

# Rates are not what they are elsewhere; what measures them is left out.
$(CHECKED)/%.passed: % $(CHECKED)/.built $(PLAYED)
	@mkdir -p $(@D)
	@$(CHECKED_PYTHON) -m pytest -p tests.sanitized -k 'not sane and not worth and not give_the_total' $< && touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch …" && $(PIP) torch
	@echo "building and installing hasten …" && $(PIP) --editable '.[torch]'
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	@echo "installing what the tests need …" && $(PIP) --editable '.[torch,test]'
	@touch $@

# A real Prometheus for the test that wants to be scraped by one: Debian's, unpacked and not installed, so nothing of it runs by itself. Where
# that cannot be (no apt, no network) the test says so and is skipped.
$(VENV)/.scraper: $(VENV)/.tested
	@command -v prometheus > /dev/null || (cd $(VENV) && { apt-get -qq download prometheus || { apt-get -qq update && apt-get -qq \
		download prometheus; }; } && dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x -C bin --strip-components 3 ./usr/bin && \
		rm prometheus_*.deb) > /dev/null 2>&1 || echo "no Prometheus to be had: a test will be skipped"
	@touch $@

clean:
	rm -rf $(VENV) build .soak .evidence .pytest_cache .mypy_cache .ruff_cache .hypothesis

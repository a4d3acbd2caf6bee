# make demo   set everything up and align a small model, start to finish
# make test   run the tests (with DeepSpeed, Megatron-Core, Ray and other engines, which it installs as well)
# make bench  this trainer and TRL's on the same pairs (about 20 minutes on two cores)
# make evidence   the method's claims in small, into docs/evidence.md (hours; EVIDENCE=quick: a sixth of it)
# make docs   build the documentation into build/docs; a broken link is an error
# make help   the rest

PYTHON ?= python3
VENV   ?= .venv
# torch goes in first and alone. On a GPU machine the default wheel is the right one; on a machine without a GPU a CPU
# wheel is far smaller: make demo TORCH="torch==2.13.0 --index-url <the CPU index that pytorch.org names>"
TORCH  ?= torch==2.13.0
# A folder of SmolLM2-135M-Instruct; fetched once into the user cache when not given.
MODEL  ?=
# Trials of each kind with each command, for make chaos: a number, or all.
CHAOS  ?= all
# A folder with sets of real pairs, for make evidence.
DATA   ?=
# Options of benchmarks/bench.py, for make bench.
BENCH  ?=
# A part of the tests of test-long or test-scale, 0/32 to 31/32 or of another number; all when not given.
PART   ?=

RUN    := $(VENV)/bin/python
# Python compiles what it imports when it does: a few of these 25,000 files.
PIP    := $(RUN) -m pip --disable-pip-version-check --quiet install --no-compile
TWO_FILES := -n 2 --dist loadfile --no-loadscope-reorder

unexport PYTHONDONTWRITEBYTECODE  # or every process that a test starts would compile all of it again

.PHONY: demo test chaos test-scale test-long bench evidence docs install engines model lint check clean help

demo: model
	MODEL="$(MODEL)" $(RUN) examples/demo/run.py

# Two files at a time, one thread each, in the order of their names: e2e, which has the longest, comes first.
test: engines
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(TWO_FILES)

# Kills, full disks, wrong bits, losses of power: hours. A part of it: make chaos CHAOS=20 CHAOS_ARGS="-k train"
chaos: engines
	@mkdir -p build
	SIMPO_CHAOS=$(CHAOS) SIMPO_CHAOS_LOG=build/chaos.jsonl $(RUN) -m pytest tests/chaos -m long $(CHAOS_ARGS)

# The same claims on four processes: a few minutes more. Only the files that have such tests are read.
test-scale: engines
	OMP_NUM_THREADS=1 SIMPO_PART=$(PART) $(RUN) -m pytest -m four_processes $(TWO_FILES) $$(grep -rl --include='test_*.py' mark.four_processes tests | sort)

# And those that take long: Ray, compiling, real weights, kills, further cases of shorter tests. A 32nd of them:
# make test-long PART=0/32 (to 31/32)
test-long: engines
	OMP_NUM_THREADS=1 SIMPO_PART=$(PART) $(RUN) -m pytest -m 'long and not four_processes' $(TWO_FILES) $$(grep -rlE --include='test_*.py' 'mark\.long|rarely|often\(' tests | sort)

# More of it: make bench BENCH="--cases all --peers trl,padded"; Liger's side needs `pip install --no-deps liger-kernel`.
bench: model
	$(RUN) benchmarks/bench.py $(if $(MODEL),--model "$(MODEL)") $(BENCH)

# What is measured lies in runs/evidence; given again, it goes on.
evidence: model
	EVIDENCE="$(EVIDENCE)" $(RUN) benchmarks/evidence.py $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)")

# The pages and the API reference, which is read from the sources without importing them.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) --constraint constraints.txt --editable '.[docs]'
	@touch $@

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV) (once; torch is the large part)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --constraint constraints.txt --editable '.[peft,tensorboard,trl,clean,math,demo,dev]'
	@touch $@

# Engines that only tests and their users need; without one its tests skip.
engines: $(VENV)/.engines

$(VENV)/.engines: $(VENV)/.installed
	@echo "installing DeepSpeed, Megatron-Core, Ray, bitsandbytes, lm-eval and a server into $(VENV) (once; for the tests)"
	$(PIP) --constraint constraints.txt --editable '.[ray,8bit,openai,serving,sweep,tasks]'
	$(PIP) --constraint constraints.txt --no-deps 'megatron-core~=0.16.0'
	$(PIP) --upgrade setuptools wheel ninja
	DS_BUILD_OPS=0 $(PIP) --constraint constraints.txt --no-build-isolation 'deepspeed~=0.19.0'
	@touch $@

model: install
	@MODEL="$(MODEL)" $(RUN) examples/demo/get_model.py

lint: install
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(VENV)/bin/basedpyright --pythonpath $(RUN) --level error

clean:
	rm -rf $(VENV) runs build src/*.egg-info .pytest_cache .ruff_cache .hypothesis

help:
	@grep -E '^# make|^[a-z]+:' Makefile

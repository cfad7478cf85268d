# The pipeline. Every artifact is a target by its name (probe-TASK, mask-TASK, groups, …). Its
# command runs if `cpift-STAGE up-to-date` says that the output is missing or not what the command
# would make now. Times of files do not count. After a run directory is moved, all its artifacts are
# out of date. Usually called through `make pipeline`.
#
#   BASE=DIR TASKS=FILE RUN=DIR    base checkpoint, task list, directory for all that is made. These
#       and all below may stand in a file, CONFIG=FILE.toml (see `cpift-pipeline --help`).
#   METHODS    what is compared with the base: by default "full-sft capped-mixture cpi-ft-plus"; the
#       second scored highest where all were compared, the third highest of those that isolate
#       cores. "full-sft multi-stage cpi-ft" are the paper's. In cpi-ft-group each group of the last
#       stage trains on its own rows, not on the balanced mixture of all tasks.
#   PROBE_TOKENS, BACKBONE_TOKENS, FINAL_TOKENS    budgets in tokens: of each probe, of the backbone
#       (in cpi-ft-plus: of the mixture it starts from), of the last stage. All other methods get
#       the sum: number of tasks x PROBE + BACKBONE + FINAL.
#   CAP    largest number of rows per task in capped-mixture and cpi-ft-plus
#   TEMPERATURE    of temperature-mixture: a task of n rows has a share of n^(1/TEMPERATURE)
#   PLUS_LR    learning rate of the last stage of cpi-ft-plus, in which only each group's own core
#       moves [default: a third of --lr]
#   P, SCOPE, TAU, ORDER, SEED     core regions and groups
#       Budgets, P and TAU default to the values of CPI-FT as published if METHODS has cpi-ft or
#       cpi-ft-group, otherwise to those of cpi-ft-plus: short probes, large cores. Probes and masks
#       are shared: to compare both methods at their best, give each a run of its own with the
#       budgets named.
#   TRAIN_FLAGS, FINAL_FLAGS, MASK_FLAGS, GROUP_FLAGS, MERGE_FLAGS, EVAL_FLAGS    more arguments
#   THREADS    threads of each program; `make -j2` runs two at a time
#   ONLY=NAMES    run the commands of these artifacts and fail if what they are made from is not up
#       to date, as a Slurm job does
#   GRAPH=1    with `make -n`: print the name and the command of every artifact, separated by a tab
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

$(if $(and $(BASE),$(TASKS),$(RUN)),,$(error name the inputs: \
	make pipeline BASE=DIR TASKS=tasks.toml RUN=DIR))

BIN ?= target/release
METHODS ?= full-sft capped-mixture cpi-ft-plus
# Each once.
unique = $(if $(1),$(firstword $(1)) $(call unique,$(filter-out $(firstword $(1)),$(1))))
override METHODS := $(strip $(call unique,$(METHODS)))
published = $(if $(filter cpi-ft cpi-ft-group,$(METHODS)),$(1),$(2))
PROBE_TOKENS ?= $(call published,200000,30000)
BACKBONE_TOKENS ?= $(call published,400000,1300000)
FINAL_TOKENS ?= $(call published,200000,150000)
CAP ?= 1000
TEMPERATURE ?= 2
P ?= $(call published,1,20)
SCOPE ?= global
TAU ?= $(call published,0.1,auto)
ORDER ?= random
SEED ?= 0
THREADS ?= 1

KNOWN := full-sft multi-stage cpi-ft cpi-ft-group capped-mixture temperature-mixture cpi-ft-plus
NAMES := $(or $(TASK_NAMES),$(shell $(BIN)/cpift-probe --tasks $(TASKS) --list | cut -f 2))
$(if $(filter ~%,$(BASE) $(TASKS) $(RUN)),$(error write BASE, TASKS and RUN without ~))
$(if $(NAMES),,$(error $(TASKS) cannot be read))
$(if $(METHODS),,$(error METHODS is empty: name some of $(KNOWN)))
$(foreach m,$(filter-out $(KNOWN),$(METHODS)),$(error METHODS: $(m) is none of $(KNOWN)))
$(if $(filter --only --only=%,$(EVAL_FLAGS)),$(error EVAL_FLAGS: --only is set here: \
	each task is scored on its own))

# Given settings are kept in RUN/pipeline.env, for `make status` and `make clean-probes`. METHODS is
# always among them, because other defaults follow from it.
SETTINGS := BASE TASKS PROBE_TOKENS BACKBONE_TOKENS FINAL_TOKENS CAP TEMPERATURE PLUS_LR P SCOPE TAU ORDER SEED \
	TRAIN_FLAGS FINAL_FLAGS MASK_FLAGS GROUP_FLAGS MERGE_FLAGS EVAL_FLAGS
keep_settings = $(shell mkdir -p $(RUN))$(file >$(RUN)/pipeline.env,METHODS=$(METHODS))$(foreach \
	v,$(SETTINGS),$(if $(filter command environment,$(origin $(v))),$(file >>$(RUN)/pipeline.env,$(v)=$($(v)))))
$(if $(ONLY)$(GRAPH),,$(keep_settings))

# A command runs through `cpift-pipeline stage`, with its log and its state in RUN/logs, if its
# artifact is among DUE: those of this call of make that are not up to date. The program checks once
# more when it starts: a remade input may have the same content as before. STARTED is the time at
# which the first command started.
tab := $(shell printf '\t')
command = $(BIN)/$(strip $(1)) --threads $(THREADS) --skip-up-to-date
run = @$(if $(GRAPH),$@$(tab)$(command),$(if $(filter $@,$(DUE)),$(if $(ONLY),$(if $(filter \
	$@,$(ONLY)),,$(refuse)))STARTED=$(STARTED) DUE='$(DUE)' $(BIN)/cpift-pipeline stage $(RUN)/logs/$@ $(command),:))
refuse = echo "pipeline: $@ is missing or not up to date, and not this job's to make" >&2; exit 1;
GRAPH_OF = MAKEFLAGS= MAKELEVEL= $(MAKE) -sn --no-print-directory -f $(firstword $(MAKEFILE_LIST)) \
	$(MAKEOVERRIDES) TASK_NAMES='$(NAMES)' GRAPH=1 $(MAKECMDGOALS)
DUE = $(eval DUE := $$(shell $$(GRAPH_OF) | $$(BIN)/cpift-mask up-to-date --due))$(if $(filter \
	0,$(.SHELLSTATUS)),,$(error cannot tell what is up to date))$(DUE)
STARTED = $(eval STARTED := $$(shell date +%s.%N))$(STARTED)

# Only writes the settings.
.PHONY: all settings $(KNOWN) groups backbone fused mixture table report
all: report
settings:
	@:

probes := $(NAMES:%=probe-%)
masks := $(NAMES:%=mask-%)
.PHONY: $(probes) $(masks)
$(probes): probe-%:
	$(call run,cpift-probe --base $(BASE) --tasks $(TASKS) --task $* --out $(RUN)/probes/$* \
		--tokens $(PROBE_TOKENS) --seed $(SEED) --resume $(TRAIN_FLAGS))
$(masks): mask-%: probe-%
	$(call run,cpift-mask extract --base $(BASE) --tuned $(RUN)/probes/$* --percent $(P) \
		--scope $(SCOPE) --out $(RUN)/masks/$*.safetensors $(MASK_FLAGS))

mask_args := $(foreach n,$(NAMES),--mask $(n)=$(RUN)/masks/$(n).safetensors)
task_args := $(foreach n,$(NAMES),--task $(n)=$(RUN)/probes/$(n))
group_args := --groups $(RUN)/groups.json
groups: $(masks)
	$(call run,cpift-group $(mask_args) --tau $(TAU) --order $(ORDER) --seed $(SEED) \
		--out $(RUN)/groups.json $(GROUP_FLAGS))
fused: backbone groups $(masks) $(probes)
	$(call run,cpift-merge cpi --base $(BASE) --backbone $(RUN)/backbone $(group_args) $(task_args) \
		$(mask_args) --out $(RUN)/fused $(MERGE_FLAGS))

# Training by cpift-train: the model it starts from, its tokens, more arguments, those that override
# TRAIN_FLAGS.
train = $(call run,cpift-train run --model $(1) --tasks $(TASKS) --out $(RUN)/$@ $(3) \
	--tokens $(2) --seed $(SEED) --resume $(TRAIN_FLAGS) $(4))
whole_budget := $(shell echo $$(($(words $(NAMES)) * $(PROBE_TOKENS) + $(BACKBONE_TOKENS) + $(FINAL_TOKENS))))
isolated := --base $(BASE) $(group_args) $(mask_args)

full-sft:
	$(call train,$(BASE),$(whole_budget))
capped-mixture:
	$(call train,$(BASE),$(whole_budget),--sample $(CAP))
temperature-mixture:
	$(call train,$(BASE),$(whole_budget),--mixture-temperature $(TEMPERATURE))
multi-stage: groups
	$(call train,$(BASE),$(whole_budget),$(group_args) --no-freeze)
# The paper's backbone: plain multi-stage training through the groups.
backbone: groups
	$(call train,$(BASE),$(BACKBONE_TOKENS),$(group_args) --no-freeze)
# The last stage: earlier cores frozen, on the balanced mixture of all tasks, or on each group's own
# rows.
stage_data_cpi-ft := mixed
stage_data_cpi-ft-group := group
cpi-ft cpi-ft-group: fused groups $(masks)
	$(call train,$(RUN)/fused,$(FINAL_TOKENS),$(isolated) --stage-data $(stage_data_$@),$(FINAL_FLAGS))
# A mixture with a cap on the rows per task instead of stages and fusion; in the last stage only the
# groups' own cores move.
mixture:
	$(call train,$(BASE),$(BACKBONE_TOKENS),--sample $(CAP))
cpi-ft-plus: mixture groups $(masks)
	$(call train,$(RUN)/mixture,$(FINAL_TOKENS),$(isolated) --trainable cores --sample $(CAP),\
		$(if $(PLUS_LR),--lr $(PLUS_LR),--lr-scale 0.333) $(FINAL_FLAGS))

# Scores of the base and of each method on each task, and those joined.
models := base $(METHODS)
define score_rules
.PHONY: scores-$(1) $(NAMES:%=score-$(1).%)
$(NAMES:%=score-$(1).%): score-$(1).%: $(filter-out base,$(1))
	$$(call run,cpift-eval run --model $(if $(filter base,$(1)),$$(BASE),$$(RUN)/$(1)) --tasks $$(TASKS) \
		--only $$* --out $$(RUN)/task-scores/$(1)/$$* $$(EVAL_FLAGS))
scores-$(1): $(NAMES:%=score-$(1).%)
	$$(call run,cpift-eval join $$(NAMES:%=$$(RUN)/task-scores/$(1)/%) --out $$(RUN)/scores/$(1))
endef
$(foreach m,$(models),$(eval $(call score_rules,$(m))))

table: $(models:%=scores-%)
	$(call run,cpift-eval compare --format markdown $(foreach m,$(models),$(m)=$(RUN)/scores/$(m)) \
		--out $(RUN)/table.md)
report: table
	$(call run,cpift-eval report $(RUN) --out $(RUN)/report.html)

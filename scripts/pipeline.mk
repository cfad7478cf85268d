# The pipeline. Every artifact is a target by its name (probe-TASK, mask-TASK, groups, …): its command runs if `cpift-STAGE
# up-to-date` says that the output is missing or not what the command would make now. Times of files do not count. After a run
# directory is moved, all its artifacts are out of date.
# Usually called through `make pipeline`.
#
#   BASE=DIR TASKS=FILE RUN=DIR    the base checkpoint, the task list, the directory for everything that is made
#   METHODS    what is compared with the base: by default "full-sft capped-mixture cpi-ft-plus"; the second scored highest where all
#       were compared, the third highest of those that isolate cores. "full-sft multi-stage cpi-ft" are the paper's. In cpi-ft-group
#       each group of the last stage trains on its own rows, not on the balanced mixture of all tasks.
#   PROBE_TOKENS, BACKBONE_TOKENS, FINAL_TOKENS    budgets in tokens: of each probe, of the backbone (in cpi-ft-plus: of the mixture
#       it starts from), of the last stage. All other methods get the sum: number of tasks x PROBE + BACKBONE + FINAL.
#   CAP    largest number of rows per task in capped-mixture and cpi-ft-plus
#   PLUS_LR    learning rate of the last stage of cpi-ft-plus, in which only each group's own core moves [default: a third of --lr]
#   P, SCOPE, TAU, ORDER, SEED     core regions and groups
#       Budgets, P and TAU default to the values of CPI-FT as published if METHODS has cpi-ft or cpi-ft-group, otherwise to those of
#       cpi-ft-plus: short probes, large cores. Probes and masks are shared: to compare both methods at their best, give each a
#       run of its own with the budgets named.
#   TRAIN_FLAGS, FINAL_FLAGS, MASK_FLAGS, GROUP_FLAGS, MERGE_FLAGS, EVAL_FLAGS    more arguments
#   THREADS    threads of each program; `make -j2` runs two at a time
#   ONLY=NAMES    run the commands of these artifacts and fail if what they are made from is not up to date, as a Slurm job does
#   GRAPH=1    with `make -n`: print the name and the command of every artifact, separated by a tab
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

$(if $(and $(BASE),$(TASKS),$(RUN)),,$(error name the inputs: make pipeline BASE=DIR TASKS=tasks.toml RUN=DIR))

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
PLUS_LR ?=
P ?= $(call published,1,20)
SCOPE ?= global
TAU ?= $(call published,0.1,auto)
ORDER ?= random
SEED ?= 0
THREADS ?= 1
TRAIN_FLAGS ?=
FINAL_FLAGS ?=
MASK_FLAGS ?=
GROUP_FLAGS ?=
MERGE_FLAGS ?=
EVAL_FLAGS ?=

NAMES := $(or $(TASK_NAMES),$(shell $(BIN)/cpift-probe --tasks $(TASKS) --list | cut -f 2))
$(if $(NAMES),,$(error $(TASKS) cannot be read))
TOTAL_TOKENS := $(shell echo $$(($(words $(NAMES)) * $(PROBE_TOKENS) + $(BACKBONE_TOKENS) + $(FINAL_TOKENS))))

KNOWN := full-sft multi-stage cpi-ft cpi-ft-group capped-mixture cpi-ft-plus
$(if $(strip $(METHODS)),,$(error METHODS is empty: name some of $(KNOWN)))
$(if $(filter ~%,$(BASE) $(TASKS) $(RUN)),$(error write BASE, TASKS and RUN without ~))
$(foreach m,$(METHODS),$(if $(filter $(m),$(KNOWN)),,$(error METHODS: $(m) is none of $(KNOWN))))
$(if $(filter --only --only=%,$(EVAL_FLAGS)),$(error EVAL_FLAGS: --only is set here: each task is scored on its own))
mask_args := $(foreach n,$(NAMES),--mask $(n)=$(RUN)/masks/$(n).safetensors)
task_args := $(foreach n,$(NAMES),--task $(n)=$(RUN)/probes/$(n))
masks := $(NAMES:%=mask-%)
probes := $(NAMES:%=probe-%)

# Given settings are kept in RUN/pipeline.env, for `make status` and `make clean-probes`. METHODS is always among them: other defaults
# may follow from it.
VARIABLES := BASE TASKS METHODS PROBE_TOKENS BACKBONE_TOKENS FINAL_TOKENS CAP PLUS_LR P SCOPE TAU ORDER SEED \
	TRAIN_FLAGS FINAL_FLAGS MASK_FLAGS GROUP_FLAGS MERGE_FLAGS EVAL_FLAGS
define newline


endef
GIVEN := METHODS $(foreach v,$(filter-out METHODS,$(VARIABLES)),$(if $(filter file,$(origin $(v))),,$(v)))
$(if $(ONLY)$(GRAPH),,$(shell mkdir -p $(RUN))$(file >$(RUN)/pipeline.env,$(subst $(newline) ,$(newline),$(foreach \
	v,$(GIVEN),$(v)=$($(v))$(newline)))))

# A command runs through stage.sh, with its log and its state in RUN/logs, if its artifact is among DUE: those of this call of make
# that are not up to date. The program checks once more when it starts: a remade input may have the same content as before.
# STARTED is the time at which the first command started.
tab := $(shell printf '\t')
common := --threads $(THREADS) --skip-up-to-date
run = @$(if $(GRAPH),$@$(tab)$(BIN)/$(strip $(1)) $(common),$(if $(filter $@,$(DUE)),$(if $(ONLY),$(if \
	$(filter $@,$(ONLY)),,$(refuse)))STARTED=$(STARTED) DUE='$(DUE)' scripts/stage.sh $(RUN)/logs/$@ $(BIN)/$(strip $(1)) $(common),:))
refuse = echo "pipeline: $@ is missing or not up to date, and not this job's to make" >&2; exit 1;
DUE = $(eval DUE := $$(shell MAKEFLAGS= MAKELEVEL= $$(MAKE) -sn --no-print-directory -f $$(firstword $$(MAKEFILE_LIST)) \
	$$(MAKEOVERRIDES) TASK_NAMES='$$(NAMES)' GRAPH=1 $$(MAKECMDGOALS) | $$(BIN)/cpift-mask up-to-date --due))$(if $(filter 0,$(.SHELLSTATUS)),,$(error cannot tell what is up to \
	date))$(DUE)
STARTED = $(eval STARTED := $$(shell date +%s.%N))$(STARTED)

.PHONY: all settings
all: report
# Only writes the settings.
settings:
	@:

define task_rules
.PHONY: probe-$(1) mask-$(1)
probe-$(1):
	$$(call run,cpift-probe --base $$(BASE) --tasks $$(TASKS) --task $(1) --out $$(RUN)/probes/$(1) --tokens $$(PROBE_TOKENS) \
		--seed $$(SEED) --resume $$(TRAIN_FLAGS))
mask-$(1): probe-$(1)
	$$(call run,cpift-mask extract --base $$(BASE) --tuned $$(RUN)/probes/$(1) --percent $$(P) --scope $$(SCOPE) \
		--out $$(RUN)/masks/$(1).safetensors $$(MASK_FLAGS))
endef
$(foreach n,$(NAMES),$(eval $(call task_rules,$(n))))

.PHONY: groups backbone fused $(KNOWN) mixture table report
groups: $(masks)
	$(call run,cpift-group $(mask_args) --tau $(TAU) --order $(ORDER) --seed $(SEED) --out $(RUN)/groups.json $(GROUP_FLAGS))

# The paper's backbone: plain multi-stage training through the groups.
backbone: groups
	$(call run,cpift-train run --model $(BASE) --tasks $(TASKS) --groups $(RUN)/groups.json --no-freeze --out $(RUN)/backbone \
		--tokens $(BACKBONE_TOKENS) --seed $(SEED) --resume $(TRAIN_FLAGS))

fused: backbone groups $(masks) $(probes)
	$(call run,cpift-merge cpi --base $(BASE) --backbone $(RUN)/backbone --groups $(RUN)/groups.json $(task_args) $(mask_args) \
		--out $(RUN)/fused $(MERGE_FLAGS))

# The last stage: earlier cores frozen, on the balanced mixture of all tasks, or on each group's own rows.
define final_rule
$(1): fused groups $(masks)
	$$(call run,cpift-train run --model $$(RUN)/fused --base $$(BASE) --tasks $$(TASKS) --groups $$(RUN)/groups.json \
		$$(mask_args) --out $$(RUN)/$(1) --stage-data $(2) --tokens $$(FINAL_TOKENS) --seed $$(SEED) --resume $$(TRAIN_FLAGS) \
		$$(FINAL_FLAGS))
endef
$(eval $(call final_rule,cpi-ft,mixed))
$(eval $(call final_rule,cpi-ft-group,group))

# A mixture with a cap on the rows per task instead of stages and fusion; in the last stage only the groups' own cores move.
mixture:
	$(call run,cpift-train run --model $(BASE) --tasks $(TASKS) --out $(RUN)/mixture --tokens $(BACKBONE_TOKENS) --sample $(CAP) \
		--seed $(SEED) --resume $(TRAIN_FLAGS))
cpi-ft-plus: mixture groups $(masks)
	$(call run,cpift-train run --model $(RUN)/mixture --base $(BASE) --tasks $(TASKS) --groups $(RUN)/groups.json $(mask_args) \
		--out $(RUN)/cpi-ft-plus --trainable cores --sample $(CAP) --tokens $(FINAL_TOKENS) --seed $(SEED) --resume $(TRAIN_FLAGS) \
		$(if $(PLUS_LR),--lr $(PLUS_LR),--lr-scale 0.333) $(FINAL_FLAGS))

# The baselines, with the whole budget.
full-sft:
	$(call run,cpift-train run --model $(BASE) --tasks $(TASKS) --out $(RUN)/full-sft --tokens $(TOTAL_TOKENS) --seed $(SEED) \
		--resume $(TRAIN_FLAGS))
multi-stage: groups
	$(call run,cpift-train run --model $(BASE) --tasks $(TASKS) --groups $(RUN)/groups.json --no-freeze --out $(RUN)/multi-stage \
		--tokens $(TOTAL_TOKENS) --seed $(SEED) --resume $(TRAIN_FLAGS))
capped-mixture:
	$(call run,cpift-train run --model $(BASE) --tasks $(TASKS) --out $(RUN)/capped-mixture --tokens $(TOTAL_TOKENS) \
		--sample $(CAP) --seed $(SEED) --resume $(TRAIN_FLAGS))

# Scores of a model on each task, and those joined: the model's name, its directory, the artifact it is.
define score_rules
.PHONY: scores-$(1) $(NAMES:%=score-$(1).%)
$(NAMES:%=score-$(1).%): $(3)
	$$(call run,cpift-eval run --model $(2) --tasks $$(TASKS) --only $$(@:score-$(1).%=%) --out $$(RUN)/task-scores/$(1)/$$(@:score-$(1).%=%) \
		$$(EVAL_FLAGS))
scores-$(1): $(NAMES:%=score-$(1).%)
	$$(call run,cpift-eval join $$(NAMES:%=$$(RUN)/task-scores/$(1)/%) --out $$(RUN)/scores/$(1))
endef
$(eval $(call score_rules,base,$$(BASE)))
$(foreach m,$(METHODS),$(eval $(call score_rules,$(m),$$(RUN)/$(m),$(m))))

table: $(patsubst %,scores-%,base $(METHODS))
	$(call run,cpift-eval compare --format markdown $(foreach m,base $(METHODS),$(m)=$(RUN)/scores/$(m)) --out $(RUN)/table.md)
report: table
	$(call run,cpift-eval report $(RUN) --out $(RUN)/report.html)

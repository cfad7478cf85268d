# The pipeline as file targets: a stage runs again when one of its inputs is newer or its settings have changed. Usually called through `make pipeline`.
#
#   BASE=DIR TASKS=FILE RUN=DIR    the base checkpoint, the task list, the folder for everything that is made
#   PROBE_TOKENS, BACKBONE_TOKENS, FINAL_TOKENS    budgets in tokens: of each probe, of the backbone, of the last stage.
#       The baselines (full-sft, multi-stage) get the sum: number of tasks x PROBE + BACKBONE + FINAL.
#   METHODS    what is compared with the base, of full-sft, multi-stage, cpi-ft and cpi-ft-plus (default: the first three)
#   PLUS_SAMPLE, PLUS_LR    of cpi-ft-plus: the most rows of a task, in the mixture that it starts from (which has the backbone's budget) and in
#       its last stage, where each group's own core alone moves; the rate of that stage (default: as before)
#   P, SCOPE, TAU, ORDER, SEED     core regions and groups
#   TRAIN_FLAGS, FINAL_FLAGS, GROUP_FLAGS, MERGE_FLAGS, EVAL_FLAGS    more arguments
#   THREADS    threads of each program; `make -j2` runs two at a time
#   ONLY=FILES    make these files and refuse to make what they are made of, as each job on a cluster does
#   GRAPH=1    with `make -n`: a line for each artifact that is to be made: name, file, what it is made of, command, separated by tabs;
#       with -B all of them. scripts/slurm/submit.sh and scripts/status.py read it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: all

$(if $(and $(BASE),$(TASKS),$(RUN)),,$(error name the inputs: make pipeline BASE=DIR TASKS=tasks.toml RUN=DIR))

BIN ?= target/release
PROBE_TOKENS ?= 200000
BACKBONE_TOKENS ?= 400000
FINAL_TOKENS ?= 200000
METHODS ?= full-sft multi-stage cpi-ft
PLUS_SAMPLE ?= 1000
PLUS_LR ?=
P ?= 1
SCOPE ?= global
TAU ?= 0.1
ORDER ?= random
SEED ?= 0
THREADS ?= 1
TRAIN_FLAGS ?=
FINAL_FLAGS ?=
MASK_FLAGS ?=
GROUP_FLAGS ?=
MERGE_FLAGS ?=
EVAL_FLAGS ?=

# index, name, training file and evaluation file of every task, tab-separated
LIST := $(shell $(BIN)/cpift-probe --tasks $(TASKS) --list | tr '\t' ';')
$(if $(LIST),,$(error $(TASKS) cannot be read))
field = $(word $(2),$(subst ;, ,$(1)))
NAMES := $(foreach t,$(LIST),$(call field,$(t),2))
TRAIN := $(foreach t,$(LIST),$(call field,$(t),3))
EVAL := $(foreach t,$(LIST),$(call field,$(t),4))
TOTAL_TOKENS := $(shell echo $$(($(words $(NAMES)) * $(PROBE_TOKENS) + $(BACKBONE_TOKENS) + $(FINAL_TOKENS))))

MASKS := $(NAMES:%=$(RUN)/masks/%.safetensors)
PROBES := $(NAMES:%=$(RUN)/probes/%/cpift.json)
SCORES := $(patsubst %,$(RUN)/scores/%/scores.json,base $(METHODS))
$(foreach m,$(METHODS),$(if $(filter $(m),full-sft multi-stage cpi-ft cpi-ft-plus),,$(error METHODS: $(m) is none of full-sft, multi-stage, cpi-ft, cpi-ft-plus)))
BASE_FILES := $(wildcard $(BASE)/config.json $(BASE)/*.safetensors)
mask_args := $(foreach n,$(NAMES),--mask $(n)=$(RUN)/masks/$(n).safetensors)
task_args := $(foreach n,$(NAMES),--task $(n)=$(RUN)/probes/$(n))
common := --threads $(THREADS) --force

# Runs a program with its log and its state in RUN/logs; on a terminal or in a CI log the reader sees one line for each artifact.
tab := $(shell printf '\t')
run = @$(if $(GRAPH),$(1)$(tab)$@$(tab)$^$(tab)$(strip $(2)) $(common),$(if $(ONLY),$(if $(filter $@,$(ONLY)),,$(call refuse,$@)))$(3) scripts/stage.sh \
	$(RUN)/logs/$(1) $(BIN)/$(2) $(common))
refuse = echo "pipeline: $(1) is missing or older than what it is made of, and not this job's to make" >&2; exit 1;

# The settings of each stage are inputs too: a stamp that is rewritten only when they change. Where nothing may be written, by ONLY
# and GRAPH, changed settings are an error or a file that is always newer.
stamp = $(or $(shell f=$(RUN)/settings/$(1); s='$(strip $(2))'; [ "$$(cat $$f 2>/dev/null)" = "$$s" ] || \
	$(if $(ONLY)$(GRAPH),exit 0,{ mkdir -p $(RUN)/settings; printf '%s' "$$s" > $$f.$$$$; mv $$f.$$$$ $$f; }); echo $$f),\
	$(if $(GRAPH),changed-settings,$(error $(RUN)/settings/$(1): the settings have changed since the job was submitted)))
.PHONY: changed-settings

# What scripts/status.py needs to ask again.
define newline


endef
VARIABLES := BASE TASKS PROBE_TOKENS BACKBONE_TOKENS FINAL_TOKENS METHODS PLUS_SAMPLE PLUS_LR P SCOPE TAU ORDER SEED \
	TRAIN_FLAGS FINAL_FLAGS MASK_FLAGS GROUP_FLAGS MERGE_FLAGS EVAL_FLAGS
$(if $(ONLY)$(GRAPH),,$(shell mkdir -p $(RUN)/settings)$(file >$(RUN)/settings/variables,$(foreach v,$(VARIABLES),$(v)=$($(v))$(newline))))

PROBE_SET := $(call stamp,probe,$(BASE) $(PROBE_TOKENS) $(SEED) $(TRAIN_FLAGS))
MASK_SET := $(call stamp,mask,$(P) $(SCOPE) $(MASK_FLAGS))
GROUP_SET := $(call stamp,group,$(TAU) $(ORDER) $(SEED) $(GROUP_FLAGS))
BACKBONE_SET := $(call stamp,backbone,$(BASE) $(BACKBONE_TOKENS) $(SEED) $(TRAIN_FLAGS))
FUSED_SET := $(call stamp,fused,$(BASE) $(MERGE_FLAGS))
MIXTURE_SET := $(call stamp,mixture,$(BASE) $(BACKBONE_TOKENS) $(PLUS_SAMPLE) $(SEED) $(TRAIN_FLAGS))
PLUS_SET := $(call stamp,plus,$(FINAL_TOKENS) $(PLUS_SAMPLE) $(PLUS_LR) $(SEED) $(TRAIN_FLAGS) $(FINAL_FLAGS))
FINAL_SET := $(call stamp,final,$(FINAL_TOKENS) $(SEED) $(TRAIN_FLAGS) $(FINAL_FLAGS))
BASELINE_SET := $(call stamp,baselines,$(BASE) $(TOTAL_TOKENS) $(SEED) $(TRAIN_FLAGS))
TABLE_SET := $(call stamp,table,$(METHODS))
EVAL_SET := $(call stamp,eval,$(BASE) $(EVAL_FLAGS))

all: $(RUN)/report.html

# Probes may be deleted once masks and the fused model are made (make clean-probes) without being made again.
.SECONDARY: $(PROBES)

define task_rules
$(RUN)/probes/$(1)/cpift.json: $(2) $(TASKS) $(BASE_FILES) $(PROBE_SET)
	$$(call run,probe-$(1),cpift-probe --base $(BASE) --tasks $(TASKS) --task $(1) --out $(RUN)/probes/$(1) \
		--tokens $(PROBE_TOKENS) --seed $(SEED) --resume $(TRAIN_FLAGS))

$(RUN)/masks/$(1).safetensors: $(RUN)/probes/$(1)/cpift.json $(MASK_SET)
	$$(call run,mask-$(1),cpift-mask extract --base $(BASE) --tuned $(RUN)/probes/$(1) --percent $(P) --scope $(SCOPE) \
		--out $$@ $(MASK_FLAGS))
endef
$(foreach t,$(LIST),$(eval $(call task_rules,$(call field,$(t),2),$(call field,$(t),3))))

$(RUN)/groups.json: $(MASKS) $(GROUP_SET)
	$(call run,groups,cpift-group $(mask_args) --tau $(TAU) --order $(ORDER) --seed $(SEED) --out $@ $(GROUP_FLAGS))

# The paper's backbone: plain multi-stage training through the groups.
$(RUN)/backbone/cpift.json: $(RUN)/groups.json $(TRAIN) $(TASKS) $(BASE_FILES) $(BACKBONE_SET)
	$(call run,backbone,cpift-train run --model $(BASE) --tasks $(TASKS) --groups $(RUN)/groups.json --no-freeze \
		--out $(RUN)/backbone --tokens $(BACKBONE_TOKENS) --seed $(SEED) --resume $(TRAIN_FLAGS))

$(RUN)/fused/cpift.json: $(RUN)/backbone/cpift.json $(RUN)/groups.json $(MASKS) $(PROBES) $(FUSED_SET)
	$(call run,fused,cpift-merge cpi --base $(BASE) --backbone $(RUN)/backbone --groups $(RUN)/groups.json \
		$(task_args) $(mask_args) --out $(RUN)/fused $(MERGE_FLAGS))

$(RUN)/cpi-ft/cpift.json: $(RUN)/fused/cpift.json $(RUN)/groups.json $(MASKS) $(TRAIN) $(TASKS) $(FINAL_SET)
	$(call run,cpi-ft,cpift-train run --model $(RUN)/fused --base $(BASE) --tasks $(TASKS) --groups $(RUN)/groups.json \
		$(mask_args) --out $(RUN)/cpi-ft --tokens $(FINAL_TOKENS) --seed $(SEED) --resume $(TRAIN_FLAGS) $(FINAL_FLAGS))

# A mixture in which no task has more than so many rows instead of stages and fusion; last, only the groups' own cores move.
$(RUN)/mixture/cpift.json: $(TRAIN) $(TASKS) $(BASE_FILES) $(MIXTURE_SET)
	$(call run,mixture,cpift-train run --model $(BASE) --tasks $(TASKS) --out $(RUN)/mixture --tokens $(BACKBONE_TOKENS) \
		--sample $(PLUS_SAMPLE) --seed $(SEED) --resume $(TRAIN_FLAGS))

plus_flags := $(if $(PLUS_LR),$(shell echo '$(TRAIN_FLAGS)' | sed -E 's/--(lr|learning[-_]rate)[ =]+[^ ]+//') --lr $(PLUS_LR),$(TRAIN_FLAGS))
$(RUN)/cpi-ft-plus/cpift.json: $(RUN)/mixture/cpift.json $(RUN)/groups.json $(MASKS) $(TRAIN) $(TASKS) $(PLUS_SET)
	$(call run,cpi-ft-plus,cpift-train run --model $(RUN)/mixture --base $(BASE) --tasks $(TASKS) --groups $(RUN)/groups.json \
		$(mask_args) --out $(RUN)/cpi-ft-plus --train only-cores --sample $(PLUS_SAMPLE) --tokens $(FINAL_TOKENS) --seed $(SEED) \
		--resume $(plus_flags) $(FINAL_FLAGS))

# The baselines, with the whole budget.
$(RUN)/full-sft/cpift.json: $(TRAIN) $(TASKS) $(BASE_FILES) $(BASELINE_SET)
	$(call run,full-sft,cpift-train run --model $(BASE) --tasks $(TASKS) --out $(RUN)/full-sft \
		--tokens $(TOTAL_TOKENS) --seed $(SEED) --resume $(TRAIN_FLAGS))

$(RUN)/multi-stage/cpift.json: $(RUN)/groups.json $(TRAIN) $(TASKS) $(BASE_FILES) $(BASELINE_SET)
	$(call run,multi-stage,cpift-train run --model $(BASE) --tasks $(TASKS) --groups $(RUN)/groups.json --no-freeze \
		--out $(RUN)/multi-stage --tokens $(TOTAL_TOKENS) --seed $(SEED) --resume $(TRAIN_FLAGS))

score = $(call run,score-$(1),cpift-eval run --model $(2) --tasks $(TASKS) --out $(@D) $(EVAL_FLAGS))
$(RUN)/scores/base/scores.json: $(BASE_FILES) $(EVAL) $(TASKS) $(EVAL_SET)
	$(call score,base,$(BASE))
$(RUN)/scores/%/scores.json: $(RUN)/%/cpift.json $(EVAL) $(TASKS) $(EVAL_SET)
	$(call score,$*,$(RUN)/$*)

# Without --force, so that scores of other settings are refused.
$(RUN)/table.md: private common := --threads $(THREADS)
$(RUN)/table.md: $(SCORES) $(TABLE_SET)
	$(call run,table,cpift-eval compare --format markdown $(foreach m,base $(METHODS),$(m)=$(RUN)/scores/$(m)) --out $@,rm -f $@ &&)

# All of it on one page. What it shows was made before the table was.
$(RUN)/report.html: $(RUN)/table.md
	$(call run,report,cpift-eval report $(RUN) --out $@)

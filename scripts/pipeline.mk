# The pipeline as file targets: a stage runs again when one of its inputs is newer or its settings have changed. Usually called through `make pipeline`.
#
#   BASE=DIR TASKS=FILE RUN=DIR    the base checkpoint, the task list, the folder for everything that is made
#   METHODS    what is compared with the base: by default "full-sft capped-mixture cpi-ft-plus", the second of which did best where all were
#       tried, the third of all that isolate cores; "full-sft multi-stage cpi-ft" are the paper's. cpi-ft-group is cpi-ft with a last stage in
#       which each group trains on its own rows, not on the balanced mixture of all tasks.
#   PROBE_TOKENS, BACKBONE_TOKENS, FINAL_TOKENS    budgets in tokens: of each probe, of the backbone (of cpi-ft-plus: of the mixture that it
#       starts from), of the last stage. All other methods get the sum: number of tasks x PROBE + BACKBONE + FINAL.
#   CAP    the most rows of a task in capped-mixture and cpi-ft-plus; where no task has more, capped-mixture is full-sft again
#   PLUS_LR    the rate of the last stage of cpi-ft-plus, in which each group's own core alone moves (default: a third of that in TRAIN_FLAGS)
#   P, SCOPE, TAU, ORDER, SEED     core regions and groups
#   The defaults of the budgets, P and TAU are for CPI-FT as published where METHODS has cpi-ft or cpi-ft-group, else for cpi-ft-plus: short
#       probes, large cores.
#       Probes and masks are shared: to compare both methods at their best, give each a run of its own, with the budgets named.
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
METHODS ?= full-sft capped-mixture cpi-ft-plus
# Each once.
unique = $(if $(1),$(firstword $(1)) $(call unique,$(filter-out $(firstword $(1)),$(1))))
override METHODS := $(strip $(call unique,$(METHODS)))
published = $(if $(filter cpi-ft cpi-ft-group,$(METHODS)),$(1),$(2))
PROBE_TOKENS ?= $(call published,200000,30000)
BACKBONE_TOKENS ?= $(call published,400000,1300000)
FINAL_TOKENS ?= $(call published,200000,150000)
CAP ?= 1000
# Of the --lr in TRAIN_FLAGS, or cpift-train's default.
PLUS_LR ?= $(shell rate=$$(grep -oP -- '--(lr|learning[-_]rate)[\s=]+"?\K[0-9.eE+-]+' <<< '$(TRAIN_FLAGS)' | tail -n 1) || true; \
	LC_ALL=C awk -v rate="$${rate:-2e-5}" 'BEGIN { printf "%.2g", rate / 3 }')
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
KNOWN := full-sft multi-stage cpi-ft cpi-ft-group capped-mixture cpi-ft-plus
$(if $(strip $(METHODS)),,$(error METHODS is empty: name some of $(KNOWN)))
$(foreach m,$(METHODS),$(if $(filter $(m),$(KNOWN)),,$(error METHODS: $(m) is none of $(KNOWN))))
$(if $(filter --only --only=%,$(EVAL_FLAGS)),$(error EVAL_FLAGS: --only is set here: each task is scored on its own))
BASE_FILES := $(wildcard $(BASE)/config.json $(BASE)/*.safetensors)
mask_args := $(foreach n,$(NAMES),--mask $(n)=$(RUN)/masks/$(n).safetensors)
task_args := $(foreach n,$(NAMES),--task $(n)=$(RUN)/probes/$(n))
common := --threads $(THREADS) --force

# Runs a program with its log and its state in RUN/logs. The reader sees a line for each artifact when it is made, with its time, and step and
# loss of what trains. DUE, asked of make when the first artifact is begun, is the names of all that this call makes, STARTED when that was.
tab := $(shell printf '\t')
run = @$(if $(GRAPH),$(1)$(tab)$@$(tab)$^$(tab)$(strip $(2)) $(common),$(if $(ONLY),$(if $(filter $@,$(ONLY)),,$(call refuse,$@)))$(3) \
	STARTED=$(STARTED) DUE='$(DUE)' scripts/stage.sh $(RUN)/logs/$(1) $(BIN)/$(2) $(common))
DUE = $(eval DUE := $$(shell MAKEFLAGS= MAKELEVEL= $$(MAKE) -sn $(if $(findstring B,$(firstword -$(MAKEFLAGS))),-B) --no-print-directory \
	-f $$(firstword $$(MAKEFILE_LIST)) $$(MAKEOVERRIDES) GRAPH=1 $$(MAKECMDGOALS) | cut -s -f 1))$(DUE)
STARTED = $(eval STARTED := $$(shell date +%s.%N))$(STARTED)
refuse = echo "pipeline: $(1) is missing or older than what it is made of, and not this job's to make" >&2; exit 1;

# The settings of each stage are inputs too: a stamp that is rewritten only when they change. Where nothing may be written, by ONLY
# and GRAPH, changed settings are an error or a file that is always newer.
stamp = $(or $(shell f=$(RUN)/settings/$(1); s='$(strip $(2))'; [ "$$(cat $$f 2>/dev/null)" = "$$s" ] || \
	$(if $(ONLY)$(GRAPH),exit 0,{ mkdir -p $(RUN)/settings; printf '%s' "$$s" > $$f.$$$$; mv $$f.$$$$ $$f; }); echo $$f),\
	$(if $(GRAPH),changed-settings,$(error $(RUN)/settings/$(1): the settings have changed since the job was submitted)))
.PHONY: changed-settings

# What scripts/status.py needs to ask again, and clean-probes.sh.
define newline


endef
VARIABLES := BASE TASKS METHODS PROBE_TOKENS BACKBONE_TOKENS FINAL_TOKENS CAP PLUS_LR P SCOPE TAU ORDER SEED \
	TRAIN_FLAGS FINAL_FLAGS MASK_FLAGS GROUP_FLAGS MERGE_FLAGS EVAL_FLAGS
# METHODS, and what was given: the other defaults may follow from it.
GIVEN := METHODS $(foreach v,$(filter-out METHODS,$(VARIABLES)),$(if $(filter file,$(origin $(v))),,$(v)))
$(if $(ONLY)$(GRAPH),,$(shell mkdir -p $(RUN)/settings)$(file >$(RUN)/settings/variables,$(subst $(newline) ,$(newline),$(foreach \
	v,$(GIVEN),$(v)=$($(v))$(newline)))))

PROBE_SET := $(call stamp,probe,$(BASE) $(PROBE_TOKENS) $(SEED) $(TRAIN_FLAGS))
MASK_SET := $(call stamp,mask,$(P) $(SCOPE) $(MASK_FLAGS))
GROUP_SET := $(call stamp,group,$(TAU) $(ORDER) $(SEED) $(GROUP_FLAGS))
BACKBONE_SET := $(call stamp,backbone,$(BASE) $(BACKBONE_TOKENS) $(SEED) $(TRAIN_FLAGS))
FUSED_SET := $(call stamp,fused,$(BASE) $(MERGE_FLAGS))
MIXTURE_SET := $(call stamp,mixture,$(BASE) $(BACKBONE_TOKENS) $(CAP) $(SEED) $(TRAIN_FLAGS))
PLUS_SET := $(call stamp,plus,$(FINAL_TOKENS) $(CAP) $(PLUS_LR) $(SEED) $(TRAIN_FLAGS) $(FINAL_FLAGS))
# mixed: runs from before that was the rows of cpi-ft's last stage are made again.
FINAL_SET := $(call stamp,final,mixed $(FINAL_TOKENS) $(SEED) $(TRAIN_FLAGS) $(FINAL_FLAGS))
BASELINE_SET := $(call stamp,baselines,$(BASE) $(TOTAL_TOKENS) $(SEED) $(TRAIN_FLAGS))
CAPPED_SET := $(call stamp,capped-mixture,$(BASE) $(TOTAL_TOKENS) $(CAP) $(SEED) $(TRAIN_FLAGS))
TABLE_SET := $(call stamp,table,$(METHODS))
EVAL_SET := $(call stamp,eval,$(BASE) $(EVAL_FLAGS))

all: $(RUN)/report.html

# Probes may be deleted once masks and, of cpi-ft, the fused model are made (make clean-probes) without being made again.
.SECONDARY: $(PROBES)

define task_rules
$(RUN)/probes/$(1)/cpift.json: $(2) $(TASKS) $(BASE_FILES) $(PROBE_SET)
	$$(call run,probe-$(1),cpift-probe --base $$(BASE) --tasks $$(TASKS) --task $(1) --out $$(RUN)/probes/$(1) \
		--tokens $$(PROBE_TOKENS) --seed $$(SEED) --resume $$(TRAIN_FLAGS))

$(RUN)/masks/$(1).safetensors: $(RUN)/probes/$(1)/cpift.json $(MASK_SET)
	$$(call run,mask-$(1),cpift-mask extract --base $$(BASE) --tuned $$(RUN)/probes/$(1) --percent $$(P) --scope $$(SCOPE) \
		--out $$@ $$(MASK_FLAGS))
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

# The last stage: earlier cores frozen, on the balanced mixture of all tasks, or on each group's own rows.
define final_rule
$(RUN)/$(1)/cpift.json: $(RUN)/fused/cpift.json $(RUN)/groups.json $(MASKS) $(TRAIN) $(TASKS) $(FINAL_SET)
	$$(call run,$(1),cpift-train run --model $$(RUN)/fused --base $$(BASE) --tasks $$(TASKS) --groups $$(RUN)/groups.json \
		$$(mask_args) --out $$(RUN)/$(1) --stage-data $(2) --tokens $$(FINAL_TOKENS) --seed $$(SEED) --resume $$(TRAIN_FLAGS) \
		$$(FINAL_FLAGS))
endef
$(eval $(call final_rule,cpi-ft,mixed))
$(eval $(call final_rule,cpi-ft-group,group))

# A mixture in which no task has more than so many rows instead of stages and fusion; last, only the groups' own cores move.
$(RUN)/mixture/cpift.json: $(TRAIN) $(TASKS) $(BASE_FILES) $(MIXTURE_SET)
	$(call run,mixture,cpift-train run --model $(BASE) --tasks $(TASKS) --out $(RUN)/mixture --tokens $(BACKBONE_TOKENS) \
		--sample $(CAP) --seed $(SEED) --resume $(TRAIN_FLAGS))

$(RUN)/cpi-ft-plus/cpift.json: $(RUN)/mixture/cpift.json $(RUN)/groups.json $(MASKS) $(TRAIN) $(TASKS) $(PLUS_SET)
	$(call run,cpi-ft-plus,cpift-train run --model $(RUN)/mixture --base $(BASE) --tasks $(TASKS) --groups $(RUN)/groups.json \
		$(mask_args) --out $(RUN)/cpi-ft-plus --train only-cores --sample $(CAP) --tokens $(FINAL_TOKENS) --seed $(SEED) \
		--resume $(TRAIN_FLAGS) --lr $(PLUS_LR) $(FINAL_FLAGS))

# The baselines, with the whole budget.
$(RUN)/full-sft/cpift.json: $(TRAIN) $(TASKS) $(BASE_FILES) $(BASELINE_SET)
	$(call run,full-sft,cpift-train run --model $(BASE) --tasks $(TASKS) --out $(RUN)/full-sft \
		--tokens $(TOTAL_TOKENS) --seed $(SEED) --resume $(TRAIN_FLAGS))

$(RUN)/multi-stage/cpift.json: $(RUN)/groups.json $(TRAIN) $(TASKS) $(BASE_FILES) $(BASELINE_SET)
	$(call run,multi-stage,cpift-train run --model $(BASE) --tasks $(TASKS) --groups $(RUN)/groups.json --no-freeze \
		--out $(RUN)/multi-stage --tokens $(TOTAL_TOKENS) --seed $(SEED) --resume $(TRAIN_FLAGS))

# As the baselines, with no more than so many rows of a task.
$(RUN)/capped-mixture/cpift.json: $(TRAIN) $(TASKS) $(BASE_FILES) $(CAPPED_SET)
	$(call run,capped-mixture,cpift-train run --model $(BASE) --tasks $(TASKS) --out $(RUN)/capped-mixture \
		--tokens $(TOTAL_TOKENS) --sample $(CAP) --seed $(SEED) --resume $(TRAIN_FLAGS))

# A model on a task: model, its folder (a variable in it is for the recipe), what that is known by, task, evaluation file.
define score_rule
$(RUN)/task-scores/$(1)/$(4)/scores.json: $(3) $(5) $(TASKS) $(EVAL_SET)
	$$(call run,score-$(1).$(4),cpift-eval run --model $(2) --tasks $$(TASKS) --only $(4) --out $$(@D) $$(EVAL_FLAGS))
endef
# On every task, and the scores joined: the first three.
define model_rules
$(foreach t,$(LIST),$(eval $(call score_rule,$(1),$(2),$(3),$(call field,$(t),2),$(call field,$(t),4))))
$(RUN)/scores/$(1)/scores.json: $(foreach n,$(NAMES),$(RUN)/task-scores/$(1)/$(n)/scores.json)
	$$(call run,scores-$(1),cpift-eval join $$(NAMES:%=$$(RUN)/task-scores/$(1)/%) --out $$(@D))
endef
$(eval $(call model_rules,base,$$(BASE),$(BASE_FILES)))
$(foreach m,$(METHODS),$(eval $(call model_rules,$(m),$$(RUN)/$(m),$(RUN)/$(m)/cpift.json)))

# Without --force, so that scores of other settings are refused.
$(RUN)/table.md: private common := --threads $(THREADS)
$(RUN)/table.md: $(SCORES) $(TABLE_SET)
	$(call run,table,cpift-eval compare --format markdown $(foreach m,base $(METHODS),$(m)=$(RUN)/scores/$(m)) --out $@,rm -f $@ &&)

# All of it on one page. What it shows was made before the table was.
$(RUN)/report.html: $(RUN)/table.md
	$(call run,report,cpift-eval report $(RUN) --out $@)

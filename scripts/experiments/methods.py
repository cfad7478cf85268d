"""The methods that are compared, each as the steps that make its model.

All get the same budget in tokens: that of the probes, the backbone and the last stage together. A
[`Lab`] is one base, one task list and one seed; `Lab.method(NAME)` is the step whose output is the
model of that name.
"""

from random import Random

from store import Gathered, Inside, Named, Step, Written


class Lab:
    """One base, one task list, one seed."""

    def __init__(self, store, suite, tasks, seed):
        self.store, self.suite, self.tasks, self.seed = store, suite, tasks, seed
        self.base = suite["base"]
        self.budget = suite["budget"]
        self.total = len(tasks.names) * self.budget["probe"] + self.budget["backbone"] + self.budget["final"]

    # The stages.

    def train(self, name, model, tokens, *more):
        return Step(self.store, name, "cpift-train", "run", "--model", model, "--tasks", self.tasks,
                    "--tokens", tokens, "--seed", self.seed, *self.flags(more), *more)

    def flags(self, more):
        """The suite's arguments of training, but for those that `more` has too."""
        flags = self.suite["train"]
        return [part for pair in zip(flags[::2], flags[1::2]) if pair[0] not in more for part in pair]

    def probe(self, task, fisher=False):
        """With `fisher`, squared gradients are taken after a training that is shorter by as many
        tokens."""
        fisher_flags, cost = self.suite["fisher"], self.budget["fisher"]
        return Step(self.store, f"probe-{task}-s{self.seed}", "cpift-probe", "--base", self.base, "--tasks",
                    self.tasks, "--task", task, "--tokens", self.budget["probe"] - fisher * cost,
                    "--seed", self.seed, *self.suite["train"], *(fisher_flags if fisher else []))

    def mask(self, task, p=None, exclude=None, score="magnitude", fisher=False):
        probe = self.probe(task, fisher)
        more = ["--exclude", exclude] if exclude else []
        more += ["--fisher", Inside(probe, "fisher")] if score in ("fisher", "blend") else []
        return Step(self.store, f"mask-{task}-s{self.seed}", "cpift-mask", "extract", "--base", self.base, "--tuned", probe,
                    "--percent", p or self.suite["p"], "--score", score, *more, suffix=".safetensors")

    def random_mask(self, task, **how):
        # The draw depends on its seed and on the size alone: with one seed, all tasks of a size
        # would have one mask.
        seed = self.seed * len(self.tasks.names) + self.tasks.names.index(task)
        return Step(self.store, f"random-{task}-s{self.seed}", "cpift-mask", "random", "--like", self.mask(task, **how),
                    "--seed", seed, suffix=".safetensors")

    def masks(self, kind="core", **how):
        make = self.random_mask if kind == "random" else self.mask
        return {task: make(task, **how) for task in self.tasks.names}

    @staticmethod
    def mask_arguments(masks):
        return [part for name, mask in masks.items() for part in ("--mask", Named(name, mask))]

    def groups(self, masks, *more, order=None):
        order, more = order or self.suite["order"], list(more)
        if order in ("difficulty", "dependency"):
            more += ["--scores", self.scores(self.base)]
        if order == "dependency":
            scores = {task: self.scores(self.probe(task)) for task in self.tasks.names}
            more += ["--probe-scores", Gathered(self.store, f"probe-scores-s{self.seed}", scores)]
        return Step(self.store, f"groups-s{self.seed}", "cpift-group", *self.mask_arguments(masks), "--seed", self.seed,
                    "--order", order, "--tau", self.suite["tau"], *more, suffix=".json")

    def staged(self, name, groups, tokens, *more, model=None):
        """Plain training through the groups."""
        return self.train(name, model or self.base, tokens, "--groups", groups, "--no-freeze", *more)

    def fused(self, masks, groups, backbone, *more, fisher=False):
        tasks = [part for name in self.tasks.names for part in ("--task", Named(name, self.probe(name, fisher)))]
        arguments = ["cpi", "--base", self.base, "--groups", groups, *tasks, *self.mask_arguments(masks)]
        arguments += ["--backbone", backbone] if backbone is not self.base else []
        return Step(self.store, f"fused-s{self.seed}", "cpift-merge", *arguments, *more)

    def isolated(self, name, model, masks, groups, tokens, *more):
        """Stages in which earlier cores are frozen."""
        return self.train(name, model, tokens, "--base", self.base, "--groups", groups, *self.mask_arguments(masks), *more)

    # The methods.

    def full_sft(self, *more, name="full-sft"):
        return self.train(f"{name}-s{self.seed}", self.base, self.total, *more)

    def mixture(self, exponent):
        """All rows mixed by temperature: a task of n rows has n^exponent shares of every epoch."""
        return self.full_sft("--mixture-temperature", f"{1 / exponent:.6g}", name=f"mixture-{exponent:g}")

    def half(self):
        """HFT: a random half of the elements moves, the other half keeps its bits, in one stage over
        all rows."""
        first = self.tasks.names[0]
        half = Step(self.store, f"half-s{self.seed}", "cpift-mask", "random", "--like", self.mask(first, p=50), "--seed", self.seed,
                    suffix=".safetensors")
        masks = dict.fromkeys(self.tasks.names, half)
        groups = Step(self.store, f"groups-half-s{self.seed}", "cpift-group", *self.mask_arguments(masks), "--tau", 0, suffix=".json")
        return self.isolated(f"hft-s{self.seed}", self.base, masks, groups, self.total, "--trainable", "cores", "--sample", "all")

    def multi_stage(self, partition):
        more = ["--partition", "random", "--groups", 3] if partition == "random" else \
            ["--partition", "kind", "--tasks", self.tasks]
        groups = self.groups(self.masks(), *more, order="random")
        return self.staged(f"multi-stage-{partition}-s{self.seed}", groups, self.total)

    def lora(self):
        return self.full_sft("--lora-rank", 16, *self.suite.get("lora", []), name="lora")

    def cpi_ft(self, name="cpi-ft", masks="core", order=None, backbone="multi-stage", transplant=True, freeze=True, stages=True,
               data="mixed", merge=(), **how):
        """CPI-FT as published: probes, groups, fusion into the backbone, stages with earlier cores
        frozen on the balanced mixture of all tasks, or (`data="group"`) on each group's own rows;
        without `stages`, one stage on that mixture. `how` is that of the masks."""
        core = self.masks(**how)
        groups = self.groups(core, order=order)
        back = self.backbone(groups, backbone)
        if masks == "random":
            core = {task: self.random_mask(task) for task in self.tasks.names}
            groups = self.groups(core, "--partition", "like", "--like", groups)
        fused = self.fused(core, groups, back, *merge, fisher=how.get("fisher", False)) if transplant else self.blended(back)
        # Without a backbone to train, the last stage has its tokens.
        tokens = self.budget["final"] + (self.budget["backbone"] if back is self.base else 0)
        if not stages:
            return self.train(f"{name}-s{self.seed}", fused, tokens, "--sample", "balanced")
        if not freeze:
            return self.staged(f"{name}-s{self.seed}", groups, tokens, "--sample", "balanced", "--stage-data", data, model=fused)
        return self.isolated(f"{name}-s{self.seed}", fused, core, groups, tokens, "--stage-data", data)

    def cpi_ft_times(self, times):
        """CPI-FT with `times` the tokens of the other methods: the backbone has as many as full SFT,
        and the last stage what is left after the probes."""
        probes = len(self.tasks.names) * self.budget["probe"]
        budget = self.budget | {"backbone": self.total, "final": round(times * self.total) - self.total - probes}
        return Lab(self.store, self.suite | {"budget": budget}, self.tasks, self.seed).cpi_ft(f"cpi-ft-{times:g}-times")

    def no_fusion(self, data="group"):
        """CPI-FT without transplant and SLERP: stages from the base in which earlier cores are
        frozen, on all rows of each group (DPI), or (`data="mixed"`) on the balanced mixture."""
        core = self.masks()
        tokens = self.budget["backbone"] + self.budget["final"]
        return self.isolated(f"no-fusion-{data}-s{self.seed}", self.base, core, self.groups(core), tokens, "--stage-data", data,
                             *(["--sample", "all"] if data == "group" else []))

    def backbone(self, groups, kind):
        tokens = self.budget["backbone"]
        if kind == "base":
            return self.base
        if kind == "full-sft":
            return self.train(f"backbone-sft-s{self.seed}", self.base, tokens, "--sample", "balanced")
        return self.staged(f"backbone-s{self.seed}", groups, tokens)

    def blended(self, backbone):
        """Backbone and probes in equal parts, no core apart."""
        models = [part for model in [backbone, *map(self.probe, self.tasks.names)] for part in ("--model", model)]
        return Step(self.store, f"blended-s{self.seed}", "cpift-merge", "linear", *models)

    def evolving(self):
        """EPI: stages in which what matters most to earlier tasks is protected, found again as
        training goes on."""
        groups = self.groups(self.masks())
        tokens = self.budget["backbone"] + self.budget["final"]
        return self.train(f"epi-s{self.seed}", self.base, tokens, "--groups", groups, "--isolation", "dynamic",
                          *self.suite.get("epi", []))

    def own_cores(self, tensors=False, masks="core"):
        """In each stage the group's own core alone moves; with `tensors` it is TRACE's, whole
        tensors; with `masks="random"`, random elements. The probes' tokens are part of the budget.
        """
        core = {task: self.tensor_mask(task) for task in self.tasks.names} if tensors else self.masks(masks, p=self.suite["own_p"])
        groups = self.groups(core, "--partition", "like", "--like", self.groups(self.masks(fisher=tensors)))
        tokens = self.budget["backbone"] + self.budget["final"]
        name = "trace" if tensors else "own-cores" if masks == "core" else "own-random"
        return self.isolated(f"{name}-s{self.seed}", self.base, core, groups, tokens, "--trainable", "cores", "--sample", "all")

    def tensor_mask(self, task):
        probe = self.probe(task, fisher=True)
        return Step(self.store, f"tensors-{task}-s{self.seed}", "cpift-mask", "tensors", "--base", self.base, "--tuned", probe,
                    "--fisher", Inside(probe, "fisher"), "--percent", 10, suffix=".safetensors")

    def ours(self, masks="core"):
        """CPI-FT+: a capped mixture instead of stages, short probes, no fusion; last, only the
        groups' own cores move, at a low rate; with `masks="random"`, random elements instead."""
        plus = self.suite["plus"]
        lab = Lab(self.store, self.suite | {"budget": self.budget | plus["budget"]}, self.tasks, self.seed)
        sample, core = ["--sample", plus["rows"]], lab.masks(masks, p=plus["p"])
        groups = lab.groups(core, "--partition", "like", "--like", lab.groups(lab.masks()))
        mixture = lab.train(f"mixture-s{self.seed}", lab.base, lab.budget["backbone"], *sample)
        name = "plus" if masks == "core" else "plus-random"
        return lab.isolated(f"{name}-s{self.seed}", mixture, core, groups, lab.budget["final"], "--trainable", "cores", *sample,
                            "--lr", plus["lr"])

    def capped(self):
        """One mixed stage in which no task has more than so many rows: what CPI-FT+ is without
        isolation."""
        return self.full_sft("--sample", self.suite["plus"]["rows"], name="capped")

    # One task after another.

    def pair(self, a, b, how):
        """The model after `a` alone, and the one after `a` and then `b` by a method; both tasks get
        as many tokens."""
        tokens, stem = self.budget["pair"], f"{a}-{b}-s{self.seed}"
        first = self.train(f"then-{a}-s{self.seed}", self.base, tokens, "--only", a)
        masks = {task: self.mask(task) for task in (a, b)}
        edges = Written(self.store, f"edges-{a}-{b}.toml", f'[[edge]]\nbefore = "{a}"\nafter = "{b}"\n')
        groups = Step(self.store, f"groups-{stem}", "cpift-group", *self.mask_arguments(masks), "--tau", 2, "--order", "dependency",
                      "--edges", edges, suffix=".json")
        rest = 2 * (tokens - self.budget["probe"])
        if how == "full-sft":
            return first, self.staged(f"then-{stem}", groups, 2 * tokens)
        # A little of the first task's rows again.
        again = ["--replay", 0.05] if how.endswith("replay") else []
        if how == "replay":
            return first, self.staged(f"then-replay-{stem}", groups, 2 * tokens, *again)
        if how.startswith("epi"):
            flags = ["--groups", groups, "--isolation", "dynamic", "--sample", "all", *self.suite.get("epi", []), *again]
            return first, self.train(f"then-{how}-{stem}", self.base, 2 * tokens, *flags)
        if how.startswith("freeze"):
            more = ["--sample", "all", "--stage-data", "group", *again]
            return first, self.isolated(f"then-{how}-{stem}", self.base, masks, groups, rest, *more)
        if how.startswith("own-cores"):
            masks = {task: self.mask(task, p=self.suite["own_p"]) for task in (a, b)}
            groups = Step(self.store, f"groups-own-{stem}", "cpift-group", *self.mask_arguments(masks), "--tau", 2, "--order",
                          "dependency", "--edges", edges, suffix=".json")
            more = ["--trainable", "cores", "--sample", "all", *again]
            return first, self.isolated(f"then-{how}-{stem}", self.base, masks, groups, rest, *more)
        backbone = self.staged(f"then-backbone-{stem}", groups, rest // 2)
        names = [part for task in (a, b) for part in ("--task", Named(task, self.probe(task)))]
        fused = Step(self.store, f"then-fused-{stem}", "cpift-merge", "cpi", "--base", self.base, "--groups", groups, *names,
                     *self.mask_arguments(masks), "--backbone", backbone)
        data = "group" if how.endswith("group") else "mixed"
        return first, self.isolated(f"then-{how}-{stem}", fused, masks, groups, rest - rest // 2, "--stage-data", data)

    # One more task for a tuned model.

    def tuned(self, new):
        """The model that knows all tasks but `new`."""
        others = [name for name in self.tasks.names if name != new]
        return self.train(f"tuned-{new}-s{self.seed}", self.base, len(others) * self.budget["pair"], "--only", ",".join(others))

    def added(self, new, name, *more, share=0, own=None, alpha=None, change=0):
        """The model that knows all tasks but `new`, and that model after a stage on `new`, in which
        the replayed rows may be the model's `own`: answers to the prompts of the old tasks, or whole
        conversations."""
        tuned, more = self.tuned(new), list(more)
        if own:
            files = [self.own(tuned, new, task) for task in self.tasks.names if task != new] if own == "answers" else \
                [self.own(tuned, new)]
            more += [part for file in files for part in ("--replay-from", file)]
        return tuned, self.next_stage(tuned, new, f"{name}-{new}", *more, share=share, alpha=alpha, change=change)

    def next_stage(self, old, new, name, *more, share=0, alpha=None, change=0):
        """The model `old` after a stage on `new`: with a share of replayed tokens; with the `change`
        percent protected that tuning moved most; between the old and the new model by `alpha`."""
        more = list(more)
        if share:
            more += ["--replay-share", share]
        if change:
            mask = Step(self.store, f"change-{new}-s{self.seed}", "cpift-mask", "extract", "--base", self.base, "--tuned", old,
                        "--percent", change, suffix=".safetensors")
            more += ["--base", self.base, "--protect", mask]
        stage = self.train(f"added-{name}-s{self.seed}", old, self.budget["pair"], "--add", new, *more)
        if alpha is None:
            return stage
        return Step(self.store, f"between-{name}-s{self.seed}", "cpift-merge", "task-arithmetic", "--base", old, "--model", stage,
                    "--lambda", alpha)

    def own(self, tuned, new, task=None):
        """Rows that the model writes."""
        asked = ["--tasks", self.tasks, "--only", task] if task else ["--max-new-tokens", 60]
        return Step(self.store, f"own-{task or 'conversations'}-{new}-s{self.seed}", "cpift-eval", "sample", "--model", tuned, *asked,
                    "--rows", 200, "--seed", self.seed, *self.suite["eval"], suffix=".jsonl")

    # All tasks, one after another.

    def order(self):
        """The tasks in an order that the seed draws."""
        return Random(f"sequence {self.seed}").sample(self.tasks.names, len(self.tasks.names))

    def sequence(self, name, *more, **how):
        """The model after a stage on each task, all of as many tokens. A stage sees its own rows and
        those of the tasks before it, if it replays rows; it does not see later tasks."""
        order, model = self.order(), self.base
        for at, new in enumerate(order):
            known = order[:at + 1]
            tasks = self.tasks.only(self.store.folder / f"tasks-only-{'-'.join(known)}", known)
            lab = Lab(self.store, self.suite, tasks, self.seed)
            model = lab.next_stage(model, new, f"{name}-{at + 1}-{new}", *more, **how) if at else \
                lab.train(f"first-{new}-s{self.seed}", model, self.budget["pair"])
        return model

    def at_once(self):
        """Full SFT with as many tokens as a sequence."""
        return self.train(f"at-once-s{self.seed}", self.base, len(self.tasks.names) * self.budget["pair"])

    def scores(self, model, tasks=None):
        """The evaluation of a model, or of the base."""
        name = model.name if isinstance(model, Step) else "base"
        return Step(self.store, f"score-{name}", "cpift-eval", "run", "--model", model, "--tasks",
                    tasks or self.tasks, *self.suite["eval"])

"""The methods that are compared, each as the steps that make its model.

All get the same budget in tokens: that of the probes, the backbone and the last stage together. A [`Lab`] is one base, one task list and
one seed; `Lab.method(NAME)` is the step whose output is the model of that name.
"""

from store import Named, Source, Step


class Lab:
    """One base, one task list, one seed."""

    def __init__(self, store, suite, tasks, seed):
        self.store, self.suite, self.tasks, self.seed = store, suite, tasks, seed
        self.base = Source(suite["base"]) if isinstance(suite["base"], str) else suite["base"]
        self.budget = suite["budget"]
        self.total = len(tasks.names) * self.budget["probe"] + self.budget["backbone"] + self.budget["final"]

    # The stages.

    def train(self, name, model, tokens, *more, tasks=None, flags=None):
        return Step(self.store, name, "cpift-train", "run", "--model", model, "--tasks", self.tasks.part("train", tasks),
                    "--tokens", tokens, "--seed", self.seed, *(flags or self.suite["train"]), *more)

    def probe(self, task, *more):
        return Step(self.store, f"probe-{task}-s{self.seed}", "cpift-probe", "--base", self.base, "--tasks",
                    self.tasks.part("train", [task]), "--task", task, "--tokens", self.budget["probe"], "--seed", self.seed,
                    *self.suite["train"], *more)

    def mask(self, task, p=None, exclude=None, score=None):
        score = score or self.suite.get("score", "magnitude")
        exclude = exclude if exclude is not None else self.suite.get("exclude")
        return Step(self.store, f"mask-{task}-s{self.seed}", "cpift-mask", "extract", "--base", self.base, "--tuned",
                    self.probe(task), "--percent", p or self.suite["p"], "--score", score,
                    *(["--exclude", exclude] if exclude else []), suffix=".safetensors")

    def random_mask(self, task, **how):
        return Step(self.store, f"random-{task}-s{self.seed}", "cpift-mask", "random", "--like", self.mask(task, **how),
                    "--seed", self.seed, suffix=".safetensors")

    def masks(self, kind="core", **how):
        make = self.random_mask if kind == "random" else self.mask
        return {task: make(task, **how) for task in self.tasks.names}

    @staticmethod
    def mask_arguments(masks):
        return [part for name, mask in masks.items() for part in ("--mask", Named(name, mask))]

    def groups(self, masks, *more, order=None, tau=None):
        return Step(self.store, f"groups-s{self.seed}", "cpift-group", *self.mask_arguments(masks), "--seed", self.seed,
                    "--order", order or self.suite["order"], "--tau", tau or self.suite["tau"], *more, suffix=".json")

    def staged(self, name, groups, tokens, *more, model=None):
        """Plain training through the groups."""
        return self.train(name, model or self.base, tokens, "--groups", groups, "--no-freeze", *more)

    def fused(self, masks, groups, backbone, *more):
        tasks = [part for name in self.tasks.names for part in ("--task", Named(name, self.probe(name)))]
        arguments = ["cpi", "--base", self.base, "--groups", groups, *tasks, *self.mask_arguments(masks)]
        arguments += ["--backbone", backbone] if backbone is not self.base else []
        return Step(self.store, f"fused-s{self.seed}", "cpift-merge", *arguments, *more)

    def isolated(self, name, model, masks, groups, tokens, *more, flags=None):
        """Stages in which earlier cores are frozen."""
        return self.train(name, model, tokens, "--base", self.base, "--groups", groups, *self.mask_arguments(masks), *more,
                          flags=flags)

    # The methods.

    def full_sft(self, *more, name="full-sft"):
        return self.train(f"{name}-s{self.seed}", self.base, self.total, *more)

    def multi_stage(self, partition):
        more = ["--partition", "random", "--groups", 3] if partition == "random" else \
            ["--partition", "kind", "--tasks", self.tasks.kinds()]
        groups = self.groups(self.masks(), *more, order="random")
        return self.staged(f"multi-stage-{partition}-s{self.seed}", groups, self.total)

    def cpi_ft(self, name="cpi-ft", masks="core", order=None, tau=None, backbone="multi-stage", merge=(), final=(), how=None):
        """CPI-FT as published: probes, groups, fusion into the backbone, stages with earlier cores frozen."""
        how = how or {}
        core = self.masks(**how)
        groups = self.groups(core, order=order, tau=tau)
        used = self.masks(masks, **how)
        if masks == "random":
            groups = self.groups(used, "--partition", "like", "--groups-of", groups)
        back = self.backbone(groups) if backbone == "multi-stage" else self.base
        fused = self.fused(used, groups, back, *merge)
        return self.isolated(f"{name}-s{self.seed}", fused, used, groups, self.budget["final"], *final)

    def backbone(self, groups):
        return self.staged(f"backbone-s{self.seed}", groups, self.budget["backbone"])

    def scores(self, model, tasks=None):
        """The evaluation of a model, or of the base."""
        name = model.name if isinstance(model, Step) else "base"
        return Step(self.store, f"score-{name}", "cpift-eval", "run", "--model", model, "--tasks",
                    (tasks or self.tasks).part("eval"), *self.suite["eval"])

"""What is compared in each experiment: rows of methods, or pairs of tasks one after the other."""

from dataclasses import dataclass
from itertools import permutations

from methods import Lab
from store import Source, Step


@dataclass
class Setting:
    """Where, on what, and over which seeds."""

    store: object
    suite: dict
    tasks: object
    seeds: list
    args: object

    def labs(self, tasks=None, **changes):
        return [Lab(self.store, self.suite | changes, tasks or self.tasks, seed) for seed in self.seeds]


def tokens(model):
    """Tokens that all training behind a model has seen; what is used twice counts once."""
    seen = {}

    def visit(step):
        if isinstance(step, Step) and step.key not in seen:
            facts = step.facts() if step.program in ("cpift-probe", "cpift-train") else {}
            seen[step.key] = facts.get("tokens", 0) + facts.get("fisher_tokens", 0)
            # Groups by kind or at random are read beside masks that tell nothing about them; of a
            # mask, random elements have the number alone.
            blind = "--partition" in step.arguments and "like" not in step.arguments or "random" in step.arguments[:1]
            for other in [] if blind else step.inputs():
                visit(other)

    visit(model)
    return sum(seen.values())


class Table:
    """Methods by tasks, over seeds."""

    kind = "scores"

    def __init__(self, title, question, rows, baseline=None, axis=None, tasks=None):
        """`rows`: (name, models by seed, more fields)."""
        self.title, self.question, self.baseline, self.axis = title, question, baseline, axis
        self.rows = [(name, models, [lab.scores(model, tasks) for lab, model in models], more) for name, models, more in rows]

    def steps(self):
        return [score for *_, scores, _ in self.rows for score in scores]

    def json(self, name, path):
        rows = []
        for row, models, scores, more in self.rows:
            counts = [tokens(model) for _, model in models]
            rows.append({"name": row, "tokens": sum(counts) // len(counts), "runs": [path(s) for s in scores]} | more)
        known = {"baseline": self.baseline, "axis": self.axis}
        return {"format_version": 1, "name": name, "title": self.title, "question": self.question, "kind": self.kind,
                **{key: value for key, value in known.items() if value is not None}, "rows": rows}


class Forgetting:
    """Two tasks one after the other, in every order: what the first loses, what the second gains.
    """

    kind = "forgetting"

    def __init__(self, title, question, methods, labs, pairs):
        self.title, self.question = title, question
        self.rows = []
        for method, make in methods.items():
            found = []
            for lab in labs:
                for first, second in pairs:
                    both = make(lab, first, second)
                    found.append((first, second, lab.scores(both[0]), lab.scores(both[1])))
            self.rows.append((method, found))

    def steps(self):
        return [score for _, found in self.rows for *_, a, b in found for score in (a, b)]

    def json(self, name, path):
        pairs = lambda found: [{"first": f, "second": s, "after_first": path(a), "after_second": path(b)} for f, s, a, b in found]
        rows = [{"name": method, "pairs": pairs(found)} for method, found in self.rows]
        return {"format_version": 1, "name": name, "title": self.title, "question": self.question, "kind": self.kind,
                "baseline": rows[0]["name"], "rows": rows}


def over(labs, make):
    return [(lab, make(lab)) for lab in labs]


def rows(labs, methods):
    return [(name, over(labs, make), {"note": NOTES[name]} if name in NOTES else {}) for name, make in methods.items()]


BASELINES = {
    "base": lambda lab: lab.base,
    "full SFT": lambda lab: lab.full_sft(),
    "multi-stage, random": lambda lab: lab.multi_stage("random"),
    "multi-stage, by kind": lambda lab: lab.multi_stage("kind"),
    "LoRA": lambda lab: lab.lora(),
    "HFT": lambda lab: lab.half(),
}
MIXTURES = {f"mixture, n^{exponent}": lambda lab, exponent=exponent: lab.mixture(exponent) for exponent in (0.3, 0.5, 0.7)}
AFTER = {
    "CPI-FT, no fusion": lambda lab: lab.no_fusion(),
    "EPI": lambda lab: lab.evolving(),
    "own cores": lambda lab: lab.own_cores(),
    "own cores, random masks": lambda lab: lab.own_cores(masks="random"),
    "TRACE": lambda lab: lab.own_cores(tensors=True),
}
CONTROLS = {
    "CPI-FT, random masks": lambda lab: lab.cpi_ft("random-masks", masks="random"),
    "CPI-FT, no freezing": lambda lab: lab.cpi_ft("no-freeze", freeze=False),
    "replay alone": lambda lab: lab.full_sft("--sample", "balanced", name="replay-alone"),
    "capped mixture": lambda lab: lab.capped(),
}
CPI_FT = {"CPI-FT": lambda lab: lab.cpi_ft()}
GROUP_STAGES = {"CPI-FT, group stages": lambda lab: lab.cpi_ft("group-stages", data="group")}
OURS = {"CPI-FT+": lambda lab: lab.ours()}
OURS_RANDOM = {"CPI-FT+, random masks": lambda lab: lab.ours(masks="random")}
# The one method beyond the budget.
MORE = {"CPI-FT, 2.5 times the tokens": lambda lab: lab.cpi_ft_times(2.5)}
NOTES = {
    "CPI-FT, 2.5 times the tokens": "the paper's accounting, in which probes are not counted: the backbone alone sees as many tokens as "
                                    "full SFT.",
}


PAIRED = {"full SFT": "full-sft", "core frozen": "freeze", "CPI-FT": "cpi-ft", "CPI-FT, group stages": "cpi-ft-group", "EPI": "epi",
          "own cores": "own-cores", "replay of 5 %": "replay", "core frozen, replay": "freeze-replay", "EPI, replay": "epi-replay",
          "own cores, replay": "own-cores-replay"}


def reproduce(s):
    methods = BASELINES | CPI_FT | GROUP_STAGES | CONTROLS | MIXTURES | AFTER | OURS | OURS_RANDOM | MORE
    methods = {name: methods[name] for name in s.suite.get("methods", methods)}
    return Table("Methods at one budget", "Does CPI-FT beat full and multi-stage SFT that see as many tokens?",
                 rows(s.labs(), methods), s.suite.get("baseline", "full SFT"))


def forgetting(s):
    pairs = [tuple(pair.split(",")) for pair in s.args.pair or []] or list(permutations(s.tasks.names, 2))
    methods = {name: lambda lab, a, b, how=how: lab.pair(a, b, how) for name, how in PAIRED.items()}
    labs = s.labs()[:1] if len(pairs) > 1 and not s.args.seeds else s.labs()
    return Forgetting("One task after another", "How much of the first task does training on the second destroy?", methods, labs, pairs)


ADDED = {
    "no safeguard": {},
    "between, α 0.7": {"alpha": 0.7},
    "change protected": {"change": 20},
    "bottom layers frozen": {"layers": True},
    "replay of 1 %": {"share": 0.01},
    "replay of 5 %": {"share": 0.05},
    "change protected, replay of 5 %": {"change": 20, "share": 0.05},
    "bottom layers frozen, replay of 5 %": {"layers": True, "share": 0.05},
    "EPI, replay of 5 %": {"share": 0.05, "epi": True},
    "EPI, replay of 5 %, between, α 0.7": {"share": 0.05, "epi": True, "alpha": 0.7},
    "replay of 20 %": {"share": 0.2},
    "replay of 20 %, between, α 0.7": {"share": 0.2, "alpha": 0.7},
    "own answers, 20 %": {"share": 0.2, "own": "answers"},
    "EPI, own answers, 5 %": {"share": 0.05, "own": "answers", "epi": True},
    "own conversations, 20 %": {"share": 0.2, "own": "conversations"},
    "own conversations, 20 %, between, α 0.7": {"share": 0.2, "own": "conversations", "alpha": 0.7},
    "EPI, own conversations, 5 %": {"share": 0.05, "own": "conversations", "epi": True},
    "EPI, own conversations, 5 %, between, α 0.7": {"share": 0.05, "own": "conversations", "epi": True, "alpha": 0.7},
}


SEQUENCES = {name: ADDED[name] for name in (
    "no safeguard", "between, α 0.7", "change protected", "bottom layers frozen", "replay of 1 %", "replay of 5 %", "replay of 20 %",
    "change protected, replay of 5 %", "bottom layers frozen, replay of 5 %", "EPI, replay of 5 %")} | {
    "replay of 5 %, between, α 0.7": {"share": 0.05, "alpha": 0.7},
    "EPI, replay of 5 %, between, α 0.7": ADDED["EPI, replay of 5 %, between, α 0.7"],
}


def safeguard(s, how):
    """The name, the flags and the other settings of a stage with safeguards."""
    how = dict(how)
    more = ["--freeze-layers", s.suite["layers"]] if how.pop("layers", False) else []
    more += ["--isolation", "dynamic", *s.suite.get("epi", [])] if how.pop("epi", False) else []
    stage = [str(value) for value in [*(v for key, v in how.items() if key != "alpha"), *more]]
    return "-".join(stage).replace("--", "") or "plain", more, how


def adding(s):
    """Every task added to a model that is tuned on the others; its pairs are (old task, new task).
    """
    def make(how):
        name, more, how = safeguard(s, how)
        return lambda lab, old, new: lab.added(new, name, *more, **how)

    pairs = [tuple(pair.split(",")) for pair in s.args.pair or []] or list(permutations(s.tasks.names, 2))
    return Forgetting("One more task for a tuned model", "What do the old tasks lose, and what does the new one gain?",
                      {name: make(how) for name, how in ADDED.items()}, s.labs(), pairs)


def sequences(s):
    """All tasks one after another, in an order by seed; the scores are of the last model."""
    def make(how):
        name, more, how = safeguard(s, how)
        return lambda lab: lab.sequence(name, *more, **how)

    methods = {"base": BASELINES["base"], "all tasks at once": lambda lab: lab.at_once()}
    methods |= {name: make(how) for name, how in SEQUENCES.items()}
    return Table("All tasks, one after another", "Which safeguard keeps most of the earlier tasks without costing the later ones?",
                 rows(s.labs(), methods), "replay of 5 %")


def sweep(title, question, label, log, labs_of, methods):
    """`labs_of`: x -> labs; one line a method."""
    found = [(f"{method}, {x:g}", over(labs, make), {"series": method, "x": x})
             for x, labs in labs_of.items() for method, make in methods.items()]
    return Table(title, question, found, axis={"label": label, "log": log})


def sweep_p(s):
    return sweep("Size of the core regions", "How does p change the result?", "p (%)", True,
                 {p: s.labs(p=p) for p in (0.1, 0.5, 1, 2, 5, 10)}, CPI_FT)


def sweep_tau(s):
    labs = {tau: s.labs(tau=tau) for tau in s.suite["taus"]}
    return sweep("The threshold of similarity", "How does τ change the result?", "τ", False, labs, CPI_FT)


def sweep_lr(s):
    """One grid of learning rates for all; with --dev, what a rate is chosen by."""
    names = ("full SFT", "LoRA", "HFT", "capped mixture", "mixture, n^0.5", "CPI-FT", "CPI-FT, no fusion", "EPI", "own cores", "CPI-FT+")
    methods = BASELINES | CONTROLS | MIXTURES | CPI_FT | AFTER | OURS

    def labs(rate):
        train = list(s.suite["train"])
        train[train.index("--lr") + 1] = f"{rate:g}"
        # The last stage of CPI-FT+ stays at a third.
        return s.labs(train=train, lora=[], plus=s.suite["plus"] | {"lr": f"{rate / 3:.2g}"})

    return sweep("Learning rates", "Which rate of one grid is best for each method?", "learning rate", True,
                 {rate: labs(rate) for rate in s.suite["rates"]}, {name: methods[name] for name in names})


def imbalance(s):
    name = s.tasks.names[0]
    count = len(s.tasks.file(name, "train").read_text(encoding="utf-8").splitlines())

    def labs(share):
        folder = s.store.folder / f"tasks-{name}-{share:g}"
        return s.labs(s.tasks.with_rows(folder, {name: max(1, count * share // 100)}))

    return sweep("A task with little data", f"What is left of the result when {name} has a share of its rows?", f"rows of {name} (%)", True,
                 {share: labs(share) for share in (1, 5, 20, 100)}, {"full SFT": BASELINES["full SFT"]} | CPI_FT | OURS)


def low_data(s):
    def labs(share):
        counts = {n: len(s.tasks.file(n, "train").read_text(encoding="utf-8").splitlines()) for n in s.tasks.names}
        return s.labs(s.tasks.with_rows(s.store.folder / f"tasks-all-{share:g}", {n: max(1, c * share // 100) for n, c in counts.items()}))

    return sweep("Little data for all", "Who does best when every task has a share of its rows?", "rows (%)", True,
                 {share: labs(share) for share in (10, 30, 100)}, {"full SFT": BASELINES["full SFT"]} | CPI_FT | OURS)


def stages(s):
    methods = CPI_FT | GROUP_STAGES | {"CPI-FT, one mixed stage": lambda lab: lab.cpi_ft("one-stage", stages=False)}
    return Table("Rows and number of the last stages", "Do stages on each group's own rows, or one stage that freezes nothing, do better?",
                 rows(s.labs(), methods), "CPI-FT")


def schedules(s):
    methods = {f"CPI-FT, {order}": lambda lab, order=order: lab.cpi_ft(f"order-{order}", order=order)
               for order in ("random", "overlap", "difficulty", "dependency")}
    return Table("Order of the groups", "Does the order matter?", rows(s.labs(), methods), "CPI-FT, random")


def ablate(s):
    methods = CPI_FT | GROUP_STAGES | {
        "no transplant": lambda lab: lab.cpi_ft("no-transplant", transplant=False),
        "no SLERP": lambda lab: lab.cpi_ft("no-slerp", merge=["--omega", "0"]),
        "no fusion": lambda lab: lab.no_fusion("mixed"),
        "no freezing": CONTROLS["CPI-FT, no freezing"],
        "random masks": CONTROLS["CPI-FT, random masks"],
        "replay alone": CONTROLS["replay alone"],
        **{f"conflict {c}": lambda lab, c=c: lab.cpi_ft(f"conflict-{c}", merge=["--conflict", c]) for c in ("last", "first", "mean")},
        "backbone: base": lambda lab: lab.cpi_ft("backbone-base", backbone="base"),
        "backbone: full SFT": lambda lab: lab.cpi_ft("backbone-sft", backbone="full-sft"),
        "N-way spherical mean": lambda lab: lab.cpi_ft("spherical-mean", merge=["--weights", "spherical-mean"]),
        "task vectors": lambda lab: lab.cpi_ft("delta", merge=["--space", "delta"]),
        "score: relative": lambda lab: lab.cpi_ft("score-relative", score="relative"),
        **{f"score: {score}": lambda lab, score=score: lab.cpi_ft(f"score-{score}", score=score, fisher=True)
           for score in ("fisher", "blend")},
        "fisher, task vectors, without embeddings": lambda lab: lab.cpi_ft(
            "best-parts", merge=["--space", "delta"], score="fisher", fisher=True, exclude="embeddings,norms"),
        "without embeddings and norms": lambda lab: lab.cpi_ft("exclude", exclude="embeddings,norms"),
    }
    return Table("What each part is worth", "What happens when a part of CPI-FT is left out or changed?", rows(s.labs(), methods), "CPI-FT")


ALL = {"reproduce": reproduce, "forgetting": forgetting, "adding": adding, "sequences": sequences, "sweep-tau": sweep_tau,
       "sweep-p": sweep_p, "sweep-lr": sweep_lr, "imbalance": imbalance, "low-data": low_data, "stages": stages,
       "schedules": schedules, "ablate": ablate}

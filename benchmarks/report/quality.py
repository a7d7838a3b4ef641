"""The records of `benchmarks.quality` as tables and figures of QUALITY.md, and the papers' claims with verdicts."""

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks.quality.din import LREA_RANKS
from benchmarks.quality.experiment import Effect
from benchmarks.quality.sasrec import REFINED
from benchmarks.quality.training import mean_and_spread
from benchmarks.report.figures import Figure, Panel, Series
from benchmarks.report.markdown import markdown, short_name

CONFIRMED, REFUTED, BELOW, MISSING = "confirmed", "refuted", "below what the data can show", "not measured"
SMALLER = "confirmed, but smaller than claimed"


@dataclass(frozen=True)
class Finished:
    """An experiment's newest record."""

    path: Path
    tuning: list[dict]
    trainings: list[dict]  # those that are compared
    effects: list[Effect]
    run: dict[str, object]

    def effect(self, method: str, over: str, metric: str) -> Effect | None:
        same = (e for e in self.effects if (e.effect_of, e.over, e.metric) == (method, over, metric))
        return next(same, None)

    def by_arm(self) -> dict[str, list[dict]]:
        arms: dict[str, list[dict]] = {}
        for row in self.trainings:
            arms.setdefault(row["arm"], []).append(row)
        return arms


def read(folder: Path, experiment: str) -> Finished | None:
    """The newest record of an experiment; None if there is none."""
    files = sorted(folder.glob(f"*-{experiment}-c*.jsonl"))
    if not files:
        return None
    rows = [json.loads(line) for line in files[-1].read_text().splitlines()]
    tuning, trainings = (
        [row for row in rows if row["workload"] == workload and "arm" in row]
        for workload in (f"{experiment} tuning", experiment)
    )
    own = [f.name for f in fields(Effect)]
    compared = [row for row in rows if "effect_of" in row]
    effects = [Effect(**{name: row[name] for name in own}) for row in compared]
    return Finished(files[-1], tuning, trainings, effects, compared[0])


# --- Claims ---


@dataclass(frozen=True)
class Claim:
    """`methods` are better than `over`; by `size` where the paper says by how much, in the unit of the metric."""

    paper: str
    says: str
    experiment: str
    methods: tuple[str, ...]
    over: str
    metric: str
    size: float | None = None


RANKS = tuple(LREA_RANKS)
CLAIMS = (
    Claim(
        "CTR-Sink",
        "sinks and their bias, in two stages, raise AUC (paper: +0.36% on its MovieLens)",
        "ctr_sink",
        ("sinks with the bias",),
        "no sinks",
        "AUC",
        0.0036,
    ),
    Claim("CTR-Sink", "sinks do more than separators", "ctr_sink", ("sinks, no bias",), "[SEP]", "AUC"),
    Claim("CTR-Sink", "the bias between sinks helps", "ctr_sink", ("sinks with the bias",), "sinks, no bias", "AUC"),
    Claim("AWRSR", "refinement improves SASRec", "sasrec", REFINED, "plain", "NDCG@10"),
    Claim(
        "our question", "it does more for SASRec than a bias by distance", "sasrec", REFINED, "relative bias", "NDCG@10"
    ),
    Claim("AWRSR", "refinement improves STOSA", "stosa", REFINED, "plain", "NDCG@10"),
    Claim(
        "our question", "it does more for STOSA than a bias by distance", "stosa", REFINED, "relative bias", "NDCG@10"
    ),
    Claim("LREA", "LREA beats DIN", "din", RANKS, "DIN", "AUC"),
    Claim("LREA", "LREA beats full target attention", "din", RANKS, "softmax", "AUC"),
    Claim(
        "our question", "LREA tells recent from expired (synthetic, AUC)", "long_histories", RANKS, "softmax", "recent"
    ),
    Claim("our question", "LREA keeps rare interests (synthetic, AUC)", "long_histories", RANKS, "softmax", "rare, 4"),
)


def verdict(effect: Effect | None, size: float | None = None) -> str:
    """An interval above 0 confirms. One below 0, or below the claimed size, refutes. Any other leaves it open."""
    if effect is None:
        return MISSING
    if effect.low > 0:
        return CONFIRMED if size is None or effect.high >= size else SMALLER
    return REFUTED if effect.high < (size or 0) else BELOW


def claims_table(finished: Mapping[str, Finished]) -> str:
    heads = ("paper", "claim", "arm", "metric", "effect [95% interval]", "seeds × users", "would show", "verdict")
    return markdown(heads, (cells for claim in CLAIMS for cells in _claim_rows(claim, finished.get(claim.experiment))))


def _claim_rows(claim: Claim, finished: Finished | None) -> Iterator[tuple[str, ...]]:
    for number, method in enumerate(claim.methods):
        first = (claim.paper, claim.says) if number == 0 else ("", "")
        effect = finished.effect(method, claim.over, claim.metric) if finished else None
        figures = ("–", "–", "–") if effect is None else (interval(effect), counts(effect), f"{effect.detectable:.4f}")
        yield (*first, f"{method} over {claim.over}", claim.metric, *figures, verdict(effect, claim.size))


def interval(effect: Effect) -> str:
    return f"{effect.effect:+.4f} [{effect.low:+.4f}, {effect.high:+.4f}]"


def counts(effect: Effect) -> str:
    return f"{effect.seeds} × {effect.users}"


def summary(finished: Mapping[str, Finished]) -> str:
    """A line per claim that is measured, for README.md."""
    rows = []
    for claim in CLAIMS:
        own = finished.get(claim.experiment)
        effects = [own.effect(method, claim.over, claim.metric) if own else None for method in claim.methods]
        found = [verdict(effect, claim.size) for effect in effects]
        measured = [effect for effect in effects if effect is not None]
        if not measured:
            continue
        best = max(measured, key=lambda effect: effect.effect)
        said = (
            found[0]
            if len(set(found)) == 1
            else "; ".join(
                f"{', '.join(m for m, v in zip(claim.methods, found, strict=True) if v == kind)}: {kind}"
                for kind in dict.fromkeys(found)
            )
        )
        rows.append((claim.paper, claim.says, f"{interval(best)} {claim.metric}", said))
    return markdown(("paper", "claim", "effect of the best arm", "verdict"), rows) if rows else "Not measured yet.\n"


# --- Experiments ---


def section(finished: Finished | None) -> str:
    """Arms, effects, and where they are from."""
    if finished is None:
        return "Not measured yet.\n"
    run, (any_effect, *_) = finished.run, finished.effects
    source = (
        f"{any_effect.data}; {any_effect.seeds} seeds, {any_effect.users} users; {_machine(run)}; "
        f"`python -m benchmarks.quality.{any_effect.workload}`; record "
        f"[{finished.path.stem}](results/{finished.path.name}).\n"
    )
    return f"{arms_table(finished)}\n{effects_table(finished.effects)}\n{source}"


def arms_table(finished: Finished) -> str:
    arms = finished.by_arm()
    metrics = list(finished.trainings[0]["test"])
    differ = _changing(finished.trainings)
    rows = []
    for arm, own in arms.items():
        searched = _changing(row for row in finished.tuning if row["arm"] == arm)
        tuned = [name for name in differ if name in searched]
        settings = ", ".join(f"{name.replace('_', ' ')} {own[0]['shape'][name]}" for name in tuned)
        figures = (mean_and_spread([row["test"][name] for row in own]) for name in metrics)
        rows.append((arm, settings or "–", *figures, f"{own[0]['parameters']:,}"))
    return markdown(("arm", "hyperparameters", *metrics, "parameters"), rows)


def _changing(trainings: Iterable[dict]) -> list[str]:
    """The hyperparameters in which trainings differ."""
    values: dict[str, set] = {}
    for row in trainings:
        for name, value in row["shape"].items():
            values.setdefault(name, set()).add(value)
    return [name for name, found in values.items() if len(found) > 1]


def effects_table(effects: Iterable[Effect]) -> str:
    """A row per comparison, a column per metric."""
    compared: dict[str, dict[str, str]] = {}
    for effect in effects:
        compared.setdefault(f"{effect.effect_of} over {effect.over}", {})[effect.metric] = interval(effect)
    metrics = next(iter(compared.values()))
    rows = ((name, *(own[metric] for metric in metrics)) for name, own in compared.items())
    return markdown(("effect [95% interval]", *metrics), rows)


def absorbed_table(finished: Finished | None) -> str:
    """What LREA loses where it is served from its state: means over seeds, medians of the fidelity."""
    if finished is None:
        return "Not measured yet.\n"
    rows = []
    for arm, own in finished.by_arm().items():
        if not own[0].get("served_auc"):
            continue
        losses = {way: [row["served_auc"][way] - row["test"]["AUC"] for row in own] for way in own[0]["served_auc"]}
        # The first report of a way to serve is that of the whole rank.
        reports = [row["fidelity"]["float32"][0] for row in own]
        median = {
            name: statistics.median(report[name] for report in reports if report[name] is not None)
            for name in ("rank_correlation", "rare_loss")
        }
        figures = (f"{statistics.mean(x):+.4f} ({min(x):+.4f} to {max(x):+.4f})" for x in losses.values())
        rows.append((arm, *figures, f"{median['rank_correlation']:.4f}", f"{median['rare_loss']:.2f}"))
    ways = ("from float32 states", "from int8 states", 'float32, orientation "weights"')
    heads = ("arm", *(f"AUC {way} (range over seeds)" for way in ways), "rank correlation", "rare loss")
    return markdown(heads, rows)


def serving(folder: Path) -> str:
    """The newest record of `benchmarks.quality.din_serving`."""
    files = sorted(folder.glob("*-din-serving-cpu.jsonl"))
    if not files:
        return "Not measured yet.\n"
    rows = [json.loads(line) for line in files[-1].read_text().splitlines()]
    lengths = sorted({row["length"] for row in rows})
    served: dict[tuple[str, str], dict[int, dict]] = {}
    for row in rows:
        served.setdefault((row["model"], row["dtype"]), {})[row["length"]] = row
    heads = ("attention", "stored in", *(f"ms, L={n:,}" for n in lengths), f"bytes per user, L={lengths[-1]:,}")
    cells = (
        (*key, *(f"{own[n]['p50_ms']:.3g}" for n in lengths), f"{own[lengths[-1]]['bytes_per_user']:,}")
        for key, own in served.items()
    )
    source = f"{_machine(rows[0])}, one thread; record [{files[-1].stem}](results/{files[-1].name}).\n"
    return f"{markdown(heads, cells)}\n{source}"


def _machine(run: Mapping[str, object]) -> str:
    capability = f", {run['cpu_capability']}" if run.get("cpu_capability") else ""
    return f"{short_name(run['device'])}{capability}, torch {run['torch']}"


# --- What the attention learned ---


def mean_curve(rows: Sequence[dict], name: str) -> tuple[float, ...]:
    """The mean over seeds of a curve."""
    curves = [row["learned"][name] for row in rows if name in row["learned"]]
    return tuple(statistics.mean(points) for points in zip(*curves, strict=True))


def weights_by_lag(finished: Finished) -> Figure:
    arms = finished.by_arm()
    panels = []
    for arm, own in arms.items():
        if arm == "plain":
            continue
        series = []
        for label, rows, kind in (
            ("plain attention", arms["plain"], "raw"),
            ("raw", own, "raw"),
            ("used", own, "used"),
        ):
            curve = mean_curve(rows, f"block 0, {kind}")
            role = "ours" if kind == "used" else "peer"
            series.append(Series(label, role, tuple(range(1, len(curve) + 1)), curve))
        panels.append(Panel(arm, "items ago", "weight of the last token", tuple(series), log_y=False))
    return Figure(
        "weights-by-lag",
        "SASRec, first block: the weight that the last token gives to the item so many places back, mean over users "
        "with full sequences and over seeds. Raw: softmax(Q Kᵀ/√D); used: what the refinement or the bias makes of it.",
        tuple(panels),
    )


def reconstruction(finished: Finished) -> Figure:
    arms = {arm: own for arm, own in finished.by_arm().items() if arm.startswith("LREA")}
    curves = {arm: mean_curve(own, "error by position") for arm, own in arms.items()}
    by_position = []
    for arm, curve in curves.items():
        starts = range(0, len(curve), 10)
        means = tuple(statistics.mean(curve[start : start + 10]) for start in starts)
        by_position.append(Series(arm, "peer", tuple(start + 5.5 for start in starts), means))
    ranks = tuple(float(arm.removeprefix("LREA ")) for arm in arms)
    reached = tuple(map(statistics.mean, curves.values()))
    best = tuple(mean_curve(own, "error, best")[0] for own in arms.values())
    by_rank = (
        Series("restored", "ours", ranks, reached),
        Series("the best that any two matrices reach", "limit", ranks, best),
    )
    return Figure(
        "reconstruction",
        "LREA: relative error of a restored history, ‖E - Ê‖ / ‖E‖, over users with 200 behaviours: by position (1 is "
        "the oldest; ten in a point), and by rank (mean over positions). Restoring nothing would leave 1. Every rank "
        "has its own embeddings, and so its own best.",
        (
            Panel("by position", "position", "relative error", tuple(by_position), x_base=None),
            Panel("by rank", "rank", "relative error", by_rank, log_y=False),
        ),
    )


def sink_mass(finished: Finished) -> Figure:
    arms = finished.by_arm()
    panels = []
    for quantity in ("to sinks", "among sinks"):
        series = []
        for arm, own in arms.items():
            if not any(f"{quantity}, after" in row["learned"] for row in own):
                continue
            for when, role in (("before", "peer"), ("after", "peer")):
                curve = mean_curve(own, f"{quantity}, {when}")
                series.append(Series(f"{arm}, {when} training", role, tuple(range(1, len(curve) + 1)), curve))
        uniform = mean_curve(next(own for arm, own in arms.items() if arm != "no sinks"), f"{quantity}, uniform")
        series.append(Series("if all keys had the same weight", "limit", tuple(range(1, len(uniform) + 1)), uniform))
        panels.append(Panel(quantity, "layer", "share of attention", tuple(series), x_base=None, log_y=False))
    return Figure(
        "sink-mass",
        "CTR-Sink in MiniLM: the share of attention that the tokens between two ratings get, from all tokens and from "
        "each other, before and after training; mean over heads, 64 histories and seeds. The bias is in the first two "
        "layers.",
        tuple(panels),
    )


FIGURES: dict[str, Callable[[Finished], Figure]] = {
    "sasrec": weights_by_lag,
    "din": reconstruction,
    "ctr_sink": sink_mass,
}
EXPERIMENTS = ("ctr_sink", "sasrec", "sasrec_recbole", "stosa", "din", "long_histories")


def finished_experiments(folder: Path) -> dict[str, Finished]:
    found = {name: read(folder, name) for name in EXPERIMENTS}
    return {name: own for name, own in found.items() if own is not None}


def figures(finished: Mapping[str, Finished]) -> dict[str, Figure]:
    """By experiment."""
    return {name: of(finished[name]) for name, of in FIGURES.items() if name in finished}


def blocks(finished: Mapping[str, Finished], folder: Path, images: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """QUALITY.md's blocks by name. `images`: the path and the caption of an experiment's figure."""
    drawn = {name: f"\n![]({path})\n\n{caption}\n" for name, (path, caption) in images.items()}
    return {
        "claims": claims_table(finished),
        "serving": serving(folder),
        "absorbed": absorbed_table(finished.get("din")),
        **{name: section(finished.get(name)) + drawn.get(name, "") for name in EXPERIMENTS},
    }

"""`python -m benchmarks.plot`: draw the committed records; write RESULTS.md, tables of QUALITY.md and of README.md.

--check writes nothing; the exit status is 1 if a page or figure is stale. --compare OLD NEW compares two records (files
or folders of files): the exit status is 1 if recattn has become slower, or needs more memory, by more than --threshold,
or is no longer timed, and 2 if the records have nothing in common.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks import ROOT
from benchmarks.harness import records
from benchmarks.harness.host_time import HostCost
from benchmarks.harness.registry import FORWARD, TRAINING, Operator, load_operators
from benchmarks.harness.workloads import Workload
from benchmarks.report import compare, cost_model, markdown, quality, serving
from benchmarks.report.figures import Figure, Panel, Series, draw
from benchmarks.report.markdown import OURS, SHORT, Machine
from benchmarks.serving.outcomes import Fault, StateBuild, StoreLoad

FOLDER = Path(__file__).parent
RECORDS, FIGURES, RESULTS, README = FOLDER / "results", FOLDER / "figures", FOLDER / "RESULTS.md", ROOT / "README.md"
QUALITY = FOLDER / "QUALITY.md"
README_FIGURE = "speed-ups"


# --- What is drawn ---


def sweep(operator: Operator, machine: Machine, workloads: Sequence[Workload], direction: str, x, y) -> list[Series]:
    """A series for each implementation: y of its rows against x of their workloads."""
    found: dict[str, list[tuple[float, float]]] = {}
    for workload in workloads:
        for name in machine.contests.get((operator.name, workload.name, direction), {}):
            row = machine.row(operator.name, workload.name, direction, name)
            if row is not None:
                found.setdefault(name, []).append((x(workload), y(row)))
    return [
        Series(name, _role(operator, name), *zip(*sorted(points), strict=True))
        for name, points in found.items()
        if len(points) > 1
    ]


def _role(operator: Operator, name: str) -> str:
    if name == OURS:
        return "ours"
    return "peer" if operator.implementations[name].reference is None else "limit"


def speed_by_length(operators: dict[str, Operator], machine: Machine) -> Figure:
    operator = operators["sink_attention"]
    panels = [
        Panel(f"{kind}, {SHORT[direction]}", "tokens per sequence", "TFLOP/s", tuple(series), log_y=False)
        for causal, kind in ((False, "full"), (True, "causal"))
        for direction in (FORWARD, TRAINING)
        if (
            series := sweep(
                operator, machine, lengths(operator, machine, causal), direction, length, lambda row: row.tflops
            )
        )
    ]
    return Figure(
        "length",
        "sink_attention by sequence length, at the same total number of tokens: 8 heads, D = 64, a tenth of the tokens "
        "are sinks. Dashed line: attention without the bias, the limit.",
        tuple(panels),
    )


def lengths(operator: Operator, machine: Machine, causal: bool) -> list[Workload]:
    """The workloads of the sweep over N."""
    prefix, suffix = "gpu_" if machine.type == "cuda" else "", "_causal" if causal else ""
    return [w for w in operator.workloads if w.name == f"{prefix}n{w.length}{suffix}" and w.sinks == w.length // 10]


def length(workload: Workload) -> float:
    return workload.length


def memory_by_length(operators: dict[str, Operator], machine: Machine) -> Figure:
    operator = operators["sink_attention"]
    series = sweep(
        operator, machine, lengths(operator, machine, False), TRAINING, length, lambda row: row.peak_bytes / 2**20
    )
    panels = [Panel("sink_attention, full", "tokens per sequence", "MiB", tuple(series))] if series else []
    operator = operators["refined_attention"]
    workloads = [w for w in operator.workloads if w.name == f"n{w.length}"]
    series = sweep(operator, machine, workloads, TRAINING, length, lambda row: row.peak_bytes / 2**20)
    panels += [Panel("refined_attention, R = 64", "tokens per sequence", "MiB", tuple(series))] if series else []
    return Figure("memory", "Peak memory, not counting the inputs, forward+backward.", tuple(panels))


def cost_of_sinks(operators: dict[str, Operator], machine: Machine) -> Figure:
    operator = operators["sink_attention"]
    workloads = [w for w in operator.workloads if w.name == f"m{w.sinks}"]
    panels = [
        Panel(SHORT[direction], "sinks per 1024 tokens", "ms", tuple(series), x_base=None, log_y=False)
        for direction in (FORWARD, TRAINING)
        if (series := sweep(operator, machine, workloads, direction, lambda w: w.sinks, lambda row: row.p50_ms))
    ]
    caption = "sink_attention by number of sinks: B = 2, 8 heads, N = 1024, D = 64."
    return Figure("sinks", caption, tuple(panels))


def roofline(operators: dict[str, Operator], machine: Machine) -> Figure:
    measured = [row.ceilings for row in machine.rows() if row.ceilings]
    if not measured:
        return Figure("roofline", "", ())
    tflops, gbs = (max(ceilings[name] for ceilings in measured) for name in ("tflops", "gbs"))
    panels = []
    for direction in (FORWARD, TRAINING):
        series, xs = [], []
        for operator in operators.values():
            rows = [machine.row(operator.name, workload.name, direction) for workload in operator.workloads]
            points = [(1e3 * row.tflops / row.gbs, row.tflops) for row in rows if row is not None]
            if points:
                series.append(Series(operator.name, "peer points", *zip(*points, strict=True)))
                xs += [x for x, _ in points]
        if series:
            corners = sorted({min(xs), 1e3 * tflops / gbs, max(xs)})
            roof = Series("roof", "line", tuple(corners), tuple(min(tflops, x * gbs / 1e3) for x in corners))
            panels.append(Panel(SHORT[direction], "FLOP per byte", "TFLOP/s", (roof, *series)))
    return Figure(
        "roofline",
        "Rates that recattn reaches, counting the least arithmetic and memory traffic that each workload needs. The "
        "roof is the best measured matmul and copy; points above it ran from the caches.",
        tuple(panels),
    )


def model_against_measured(operators: dict[str, Operator], machine: Machine) -> Figure:
    found: dict[str, list[tuple[float, float]]] = {}
    for prediction in markdown.predictions(operators, machine):
        found.setdefault(prediction.row.op, []).append((prediction.milliseconds, prediction.row.p50_ms))
    if not found:
        return Figure("model", "", ())
    everything = [x for points in found.values() for point in points for x in point]
    ends = min(everything), max(everything)
    lines = [
        Series(label, "line", ends, tuple(factor * x for x in ends))
        for label, factor in (
            ("as predicted", 1.0),
            ("", 1 + cost_model.TOLERANCE),
            ("", 1 / (1 + cost_model.TOLERANCE)),
        )
    ]
    points = [Series(name, "peer points", *zip(*own, strict=True)) for name, own in found.items()]
    return Figure(
        "model",
        "Measured times against the predictions of `benchmarks/report/cost_model.py`. The outer lines are "
        f"{cost_model.TOLERANCE:.0%} off.",
        (Panel("", "predicted ms", "measured ms", (*lines, *points), x_base=10),),
    )


def speed_ups(operators: dict[str, Operator], machine: Machine) -> Figure:
    """Speedups on the workloads of the default tier."""
    names, ours, peers, limits = [], [], [], []
    for operator in operators.values():
        for workload in operator.workloads:
            direction = TRAINING if operator.grads else FORWARD
            own, base = (machine.row(operator.name, workload.name, direction, i) for i in (OURS, operator.baseline))
            if own is None or base is None or workload.tier != "default":
                continue
            at = len(names)
            names.append(f"{operator.name} · {workload.name}")
            ours.append((base.p50_ms / own.p50_ms, at))
            for name, (row, _) in machine.contests[operator.name, workload.name, direction].items():
                if row.status == records.TIMED and not operator.implementations[name].ours:
                    limit = _role(operator, name) == "limit"
                    (limits if limit else peers).append((base.p50_ms / row.p50_ms, at))
    series = [
        Series(label, role, *zip(*points, strict=True))
        for label, role, points in (
            ("computes less or something else", "limit points", limits),
            ("other PyTorch implementations", "peer points", peers),
            ("recattn", "our points", ours),
        )
        if points
    ]
    return Figure(
        README_FIGURE,
        f"Speedup over eager PyTorch ({machine.title}, {records.dtype_name(machine.dtype)}, forward+backward where "
        "there is a backward). Red dots: recattn. Other dots: other PyTorch implementations. Vertical bars: attention "
        "that computes less (without bias or refinement) or something else.",
        (Panel("", "speedup over eager", "", tuple(series), log_y=False, y_names=tuple(names)),) if names else (),
    )


DRAWN = (speed_ups, speed_by_length, cost_of_sinks, memory_by_length, roofline, model_against_measured)


def figures_of(operators: dict[str, Operator], machine: Machine) -> list[Figure]:
    return [figure for figure in (of(operators, machine) for of in DRAWN) if figure.panels]


# --- The command ---


@dataclass(frozen=True)
class Pages:
    """All pages and figures made from the records."""

    texts: dict[Path, str]
    figures: dict[Path, Figure]

    def stale(self) -> list[Path]:
        texts = [path for path, text in self.texts.items() if not path.exists() or path.read_text() != text]
        drawn = [p for p, f in self.figures.items() if not p.exists() or f.digest not in p.read_text()]
        left = [path for path in FIGURES.glob("*.svg") if path not in self.figures]
        return texts + drawn + left

    def write(self) -> None:
        for path in self.stale():
            if path in self.texts:
                path.write_text(self.texts[path])
            elif path in self.figures:
                draw(self.figures[path], path)
            else:
                path.unlink()


def pages() -> Pages:
    operators = load_operators()
    measured = markdown.machines(records.read([RECORDS]))
    figures, images = {}, {}
    for kind in ("cpu", "cuda"):
        for machine in [machine for machine in measured if machine.type == kind][:1]:
            for figure in figures_of(operators, machine):
                path = FIGURES / f"{kind}-{figure.name}.svg"
                figures[path] = figure
                images.setdefault(kind, []).append((f"{FIGURES.name}/{path.name}", figure.caption))
    first = [image for own in images.values() for image in own if README_FIGURE in image[0]][-1:]
    host = records.read_newest(HostCost, [RECORDS])
    stores = serving.section(*(records.read_newest(kind, [RECORDS]) for kind in (StateBuild, StoreLoad, Fault)))
    finished = quality.finished_experiments(RECORDS)
    learned = {}
    for name, figure in quality.figures(finished).items():
        path = FIGURES / f"quality-{figure.name}.svg"
        figures[path] = figure
        learned[name] = f"{FIGURES.name}/{path.name}", figure.caption
    blocks = quality.blocks(finished, RECORDS, learned)
    speed = markdown.readme_block(operators, measured, first, host)
    texts = {
        RESULTS: markdown.results_page(operators, measured, images, host, stores),
        README: markdown.with_blocks(README.read_text(), {"speed": speed, "summary": quality.summary(finished)}),
        QUALITY: markdown.with_blocks(QUALITY.read_text(), blocks),
    }
    return Pages(texts, figures)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.partition("\n")[0])
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--check", action="store_true", help="write nothing; fail if a page or figure is stale")
    task.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="fail if recattn regressed")
    parser.add_argument(
        "--threshold",
        type=float,
        default=compare.THRESHOLD,
        help="relative slowdown that counts as a regression, %(default)s",
    )
    chosen = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    if chosen.compare:
        try:
            old, new = (records.read([path]) for path in chosen.compare)
            changes = compare.compare(old, new, load_operators(), chosen.threshold)
        except ValueError as error:
            parser.error(f"--compare: {error}")
        compare.report(console, changes, chosen.threshold)
        return int(bool(compare.regressions(changes)))
    everything = pages()
    stale = everything.stale()
    if not chosen.check:
        everything.write()
    for path in stale:
        console.print(path.relative_to(ROOT), "is stale: python -m benchmarks.plot" if chosen.check else "written")
    return int(chosen.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())

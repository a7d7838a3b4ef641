"""The host's time of each call as a table, printed and in RESULTS.md, and as a sentence in README.md."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from benchmarks.harness.host_time import GPU, NEW_LENGTH_RATIO, HostCost

COLUMNS = ("operator", "path", "pass", "launches", "PyTorch's", "host µs", "× SDPA", "goal", "new N", "verdict")
STYLES = {"met": "green", "missed": "red", "failed": "red"}


def legend(costs: Sequence[HostCost]) -> str:
    return (
        "launches: Triton's; PyTorch's: kernels of PyTorch's own operators that a call launches on a GPU under the "
        "profiler. host µs: CPU time of the thread, the minimum over repeats. × SDPA: in units of SDPA's smallest call "
        f"here, {costs[0].unit_us:.1f} µs. new N: a call with a length that has not come before, relative to one of a "
        f"known length (goal: ≤ {NEW_LENGTH_RATIO:g})."
    )


def cells(cost: HostCost) -> tuple[str, ...]:
    launches = ("–" if count is None else str(count) for count in (cost.triton_launches, cost.torch_launches))
    times = ("–", "–") if cost.units is None else (f"{cost.host_us:.0f}", f"{cost.units:.1f}")
    goal = "–" if cost.goal is None else str(cost.goal)
    ratio = "–" if cost.new_length_ratio is None else f"{cost.new_length_ratio:.2f}"
    return (cost.host_of, cost.path, cost.step, *launches, *times, goal, ratio, cost.reason or cost.verdict or "–")


def table(costs: Sequence[HostCost]) -> Table:
    printed = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in COLUMNS:
        printed.add_column(column, justify="left" if column in COLUMNS[:3] else "right", no_wrap=True)
    for cost in costs:
        *figures, verdict = cells(cost)
        printed.add_row(*figures, Text(verdict, style=STYLES.get(cost.verdict, "dim")))
    return printed


def sentence(costs: Sequence[HostCost], device: str) -> str:
    """What a call costs, for README.md."""
    by_op: dict[str, list[str]] = {}
    for cost in costs:
        if cost.path == GPU and cost.goal is not None and cost.units is not None:
            by_op.setdefault(cost.host_of, []).append(f"{cost.units:.1f} {cost.step}")
    listed = "; ".join(f"`{op}` {', '.join(units)}" for op, units in by_op.items() if "," not in op)
    return (
        "What a call costs the host before a GPU has work (`python -m benchmarks.host_cost`), in units of PyTorch's "
        f"smallest `scaled_dot_product_attention` ({costs[0].unit_us:.0f} µs on {device}): {listed}."
    )

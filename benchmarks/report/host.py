"""The host's time of each call as a table: printed, and in RESULTS.md."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from benchmarks.harness.host_time import NEW_LENGTH_RATIO, HostCost

COLUMNS = ("operator", "path", "pass", "launches", "PyTorch's", "host µs", "× SDPA", "goal", "new N", "verdict")
LEGEND = (
    "launches: Triton's; PyTorch's: kernels that PyTorch's own operators would launch. host µs: CPU time of the "
    "thread, the minimum over repeats. × SDPA: in units of SDPA's smallest call on this CPU, {unit:.1f} µs. new N: a "
    "call with a length that has not come before, relative to a repeated call "
    f"(goal: ≤ {NEW_LENGTH_RATIO:g})."
)
STYLES = {"met": "green", "missed": "red", "failed": "red"}


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

"""Stores of user states, built, under load and under faults, as tables: printed, and in RESULTS.md."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from rich import box
from rich.console import Group
from rich.table import Table

from benchmarks.report.markdown import markdown
from benchmarks.report.table import significant
from benchmarks.serving.outcomes import P99_GOAL, Fault, StateBuild, StoreLoad

BUILD_COLUMNS = ("from", "users", "build s", "users/s", "load s", "disk MB", "states as computed directly")
LOAD_COLUMNS = (
    "store",
    "users",
    "written/s",
    "request p50 / p99 / p99.9 ms",
    "requests/s",
    "hit rate",
    "client MB",
    "engine MB",
    "disk MB",
    "wrong answers",
    "lost writes",
)
READ_COLUMNS = (
    "store",
    "while",
    "calls",
    "floor p50 / p99 / p99.9 ms",
    "get_many p50 / p99 / p99.9 ms",
    f"ratio of p99 (goal: ≤ {P99_GOAL:g})",
)
FAULT_COLUMNS = ("store", "fault", "setting", "outcome", "requests", "errors", "missing", "wrong", "lost", "back s")


def load_cells(load: StoreLoad) -> tuple[str, ...]:
    return (
        load.load_of,
        f"{load.users:,}",
        f"{load.written_per_s:,.0f}",
        _times(load.request_ms),
        significant(load.requests_per_s),
        f"{load.hit_rate:.0%}",
        f"{load.client_mb:,.0f}",
        f"{load.engine_mb:,.0f}" if load.engine_mb else "–",
        f"{load.disk_mb:,.0f}",
        str(load.wrong_answers),
        str(load.lost_writes),
    )


def read_cells(load: StoreLoad) -> Iterator[tuple[str, ...]]:
    alone = ("nothing else", load.reads_alone, load.floor_alone_ms, load.get_many_alone_ms)
    for situation, calls, floor_ms, get_many_ms in (alone, ("load", load.reads, load.floor_ms, load.get_many_ms)):
        ratio = get_many_ms["p99"] / floor_ms["p99"]
        verdict = "" if ratio <= P99_GOAL else " (missed)"
        yield load.load_of, situation, f"{calls:,}", _times(floor_ms), _times(get_many_ms), f"{ratio:.2f}×{verdict}"


def fault_cells(fault: Fault) -> tuple[str, ...]:
    counts = (fault.missing, fault.wrong_answers, fault.lost_writes)
    errors = ", ".join(f"{name} {count}" for name, count in fault.errors.items())
    back = "–" if fault.back_s is None else f"{fault.back_s:.2f}"
    row = (fault.fault_of, fault.fault, fault.setting, fault.outcome, str(fault.answers), errors or "–")
    return (*row, *map(str, counts), back)


def load_legend(load: StoreLoad) -> str:
    return (
        f"{load.clients} client processes, each with a StateCache of {load.capacity:,} users (max_age "
        f"{load.max_age:g} s) and one thread; {load.record_bytes:,} bytes per user (int8, r = 32, d = 64); requests of "
        f"256 users with {load.targets:,.0f} candidates, both Zipf ({load.zipf:g}); meanwhile another process rewrites "
        f"{load.rewritten_per_s:,.0f} users per second. Every answer is compared with the direct computation, bit for "
        "bit, outside the timed part. request: cache.request and attend. requests/s: of all clients, over the time in "
        "requests. client MB: memory of a client's own, without the page cache. lost writes: acknowledged, and not in "
        "the store at the end."
    )


READ_LEGEND = (
    "Reads of 256 uniformly drawn users, by one process alone, and by the clients between their requests. floor: the "
    "engine's own calls for as many keys (LMDB's get; MGET; GETs to all nodes of a cluster at once) and one copy. "
    "get_many: with keys, checksums, expiry and tensors."
)
FAULT_LEGEND = (
    "Counts are those of all threads before, during and after the fault: of requests (32 users each, in caches with "
    "max_age 0.1 s), and of requests and writes that raised. setting: on_unavailable or on_invalid of the StateCache, "
    'with "raise" the default. missing: users served as without a state, who have one. wrong, lost: users with an '
    "answer that was never right in that moment, and with an acknowledged write that is gone. back: seconds from the "
    "restart of the engine to the first whole answer, or as the outcome says."
)


Written = tuple[list, dict[str, object]]  # rows, and what they share


def build_cells(build: StateBuild) -> tuple[str, ...]:
    return (
        build.built_by,
        f"{build.users:,}",
        significant(build.build_s),
        f"{build.users / build.build_s:,.0f}",
        significant(build.load_s),
        f"{build.disk_mb:,.0f}",
        "yes" if build.equal else "NO",
    )


BUILD_LEGEND = (
    "States of rank 32, dim 64, int8, by `build_states` into an LMDBStore, from histories of {behaviors:,.0f} "
    "behaviours on average (Zipf, of which the newest 200 count). By Ray: one actor on one of the cores, its start "
    "included. load: all states from the store into a StateTable. The states of the first 4,096 users are compared "
    "with `export_state` of these users, bit for bit."
)


def section(builds: Written, loads: Written, faults: Written) -> str:
    """Of RESULTS.md; empty without records."""
    parts = []
    if builds[0]:
        rows, legend = markdown(BUILD_COLUMNS, map(build_cells, builds[0])), BUILD_LEGEND.format_map(vars(builds[0][0]))
        parts.append(f"### Build\n\n{_conditions('build', builds[1])} {legend}\n\n{rows}")
    if loads[0]:
        rows = markdown(LOAD_COLUMNS, map(load_cells, loads[0]))
        parts.append(f"### Load\n\n{_conditions('load', loads[1])} {REDIS} {load_legend(loads[0][0])}\n\n{rows}")
        parts.append(f"{READ_LEGEND}\n\n{markdown(READ_COLUMNS, chain.from_iterable(map(read_cells, loads[0])))}")
    if faults[0]:
        rows = markdown(FAULT_COLUMNS, map(fault_cells, faults[0]))
        parts.append(f"### Faults\n\n{_conditions('load', faults[1])} {REDIS} {FAULT_LEGEND}\n\n{rows}")
    return "\n".join(["## Serving from a store\n", *parts]) if parts else ""


REDIS = "Redis runs on the same machine, over loopback, with every write on disk before it is answered."


def _conditions(command: str, run: dict[str, object]) -> str:
    return (
        f"`python -m benchmarks.serving.{command}` on {run['device']}, {run['cores']} cores; torch {run['torch']}, "
        f"Python {run['python']}; commit {run['commit'][:8]}."
    )


def build_table(builds: Sequence[StateBuild]) -> Table:
    return _table(BUILD_COLUMNS, map(build_cells, builds))


def tables(row: StoreLoad | Fault) -> Group:
    """What is printed of a row."""
    if isinstance(row, Fault):
        return Group(_table(FAULT_COLUMNS, [fault_cells(row)]))
    return Group(_table(LOAD_COLUMNS, [load_cells(row)]), _table(READ_COLUMNS, read_cells(row)))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    return table


def _times(times: dict[str, float]) -> str:
    return " / ".join(map(significant, times.values()))

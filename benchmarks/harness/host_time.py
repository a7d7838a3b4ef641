"""The host's time of small calls: what Python, PyTorch and Triton's launch path take before a device has work.

Every figure is CPU time of the thread, the minimum over repeats of the mean of a few calls: other programs on the
machine change it least. The unit is SDPA's smallest call.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import recattn
from benchmarks.harness import dry_driver
from benchmarks.harness.goals import HostGoal
from benchmarks.harness.registry import FORWARD, TRAINING

GPU, CPU = "GPU, dry run", "CPU"
BATCH_SECONDS = 0.003  # of the calls whose mean is one repeat
ROUNDS, REPEATS = 3, 10
# Lengths that no call has had: each block of them is one repeat.
NEW_LENGTHS, BLOCK = range(40, 120), 10
KNOWN_LENGTH = 79
SEEN_LENGTHS = (32, 33)  # so that Triton has compiled for lengths that are a multiple of 16, and that are not


class Sizes(NamedTuple):
    """The sizes of a call, but for its length."""

    batch: int
    heads: int
    sinks: int
    dtype: torch.dtype
    dim: int = 64
    rank: int = 16


class Call(NamedTuple):
    """Arguments of a public function, those of them that get a gradient, and the gradients of its outputs."""

    function: Callable[..., object]
    arguments: dict[str, object]
    leaves: tuple[str, ...] = ()
    douts: tuple[Tensor, ...] = ()

    def in_direction(self, direction: str, impl: str | None) -> Callable[[], object]:
        """The call to time. It has not run."""
        run = partial(self.function, **self.arguments, **({"impl": impl} if impl else {}))
        if direction == FORWARD:
            return run
        leaves = [self.arguments[name] for name in self.leaves]
        return lambda: torch.autograd.grad(run(), leaves, self.douts)


# --- The calls, by the length N of a sequence ---


def leaf(*shape: int, like: Sizes, dtype: torch.dtype | None = None) -> Tensor:
    return torch.rand(shape, dtype=dtype or like.dtype).requires_grad_()


def heads_last(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype) -> Tensor:
    """[B, H, N, D] as a projection leaves it: in the memory of [B, N, H, D]."""
    return torch.rand(batch, length, heads, dim, dtype=dtype).transpose(1, 2).requires_grad_()


def gradients(*outs: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.rand(out.shape, dtype=out.dtype) for out in outs)


def positions(s: Sizes, length: int) -> Tensor:
    return torch.arange(s.sinks).expand(s.batch, -1) * (length // s.sinks)


def sink_attention(s: Sizes, length: int) -> Call:
    tensors = {name: leaf(s.batch, s.heads, length, s.dim, like=s) for name in "qkv"}
    bias = leaf(s.batch, 1, s.sinks, s.sinks, like=s, dtype=torch.float32)
    tensors |= {"sink_positions": positions(s, length), "inter_sink_bias": bias}
    return Call(recattn.sink_attention, tensors, ("q", "k", "v", "inter_sink_bias"), gradients(tensors["v"]))


def padded_sink_attention(s: Sizes, length: int) -> Call:
    dense = sink_attention(s, length)
    return dense._replace(arguments={**dense.arguments, "seq_lens": torch.arange(s.batch) % 2 + length - 1})


def packed_sink_attention(s: Sizes, length: int) -> Call:
    dense = sink_attention(s, length).arguments
    offsets = torch.arange(s.batch + 1) * length
    tensors = {name: leaf(int(offsets[-1]), s.heads, s.dim, like=s) for name in "qkv"}
    arguments = {**dense, **tensors, "cu_seqlens": offsets}
    return Call(recattn.sink_attention, arguments, ("q", "k", "v", "inter_sink_bias"), gradients(tensors["v"]))


def inter_sink_bias(s: Sizes, length: int) -> Call:
    """The number of sinks is an eighth of the length."""
    sinks = max(length // 8, 1)
    tensors = {name: leaf(s.batch, s.heads, sinks, s.dim, like=s) for name in ("q_s", "k_s")}
    return Call(recattn.inter_sink_bias, tensors, tuple(tensors), (torch.rand(s.batch, 1, sinks, sinks),))


def bias_and_attention(s: Sizes, length: int) -> Call:
    """What `nn.InterSinkBias` and then `nn.SinkAttention` call, with their projections' memory layouts."""
    tensors = {name: heads_last(s.batch, s.heads, s.sinks, s.dim, s.dtype) for name in ("q_s", "k_s")}
    tensors |= {name: heads_last(s.batch, s.heads, length, s.dim, s.dtype) for name in "qkv"}
    tensors["bias_scale"] = torch.ones(1, dtype=s.dtype).requires_grad_()
    indices = {"sink_mask": torch.ones(s.batch, s.sinks, dtype=torch.bool), "sink_positions": positions(s, length)}

    def both(q_s, k_s, sink_mask, bias_scale, q, k, v, sink_positions, impl=None):
        bias = recattn.inter_sink_bias(q_s, k_s, sink_mask=sink_mask, bias_scale=bias_scale, impl=impl)
        return recattn.sink_attention(q, k, v, sink_positions, bias, impl=impl)

    return Call(both, tensors | indices, tuple(tensors), gradients(tensors["v"]))


def refined_attention(s: Sizes, length: int) -> Call:
    tensors = {name: leaf(s.batch, s.heads, length, s.dim, like=s) for name in "qkv"}
    tensors |= {name: leaf(length, length, like=s) for name in ("w_q", "w_k")}
    return Call(recattn.refined_attention, tensors | {"causal": True}, tuple(tensors), gradients(tensors["v"]))


def wasserstein_attention(s: Sizes, length: int) -> Call:
    names = [f"{part}_{name}" for name in "qkv" for part in ("mean", "cov")]
    tensors = {name: leaf(s.batch, s.heads, length, s.dim, like=s) for name in names}
    douts = gradients(tensors["mean_v"], tensors["cov_v"])
    return Call(recattn.wasserstein_attention, tensors | {"causal": True}, tuple(tensors), douts)


def lrea_compress(s: Sizes, length: int) -> Call:
    tensors = {"behaviors": leaf(s.batch, length, s.dim, like=s), "w_comp": leaf(length, s.rank, like=s)}
    dout = torch.rand(s.batch, s.rank, s.dim, dtype=s.dtype)
    return Call(recattn.lrea_compress, tensors, tuple(tensors), (dout,))


def lrea_attention(s: Sizes, length: int) -> Call:
    """`length` targets in all, and histories of 100."""
    tensors = {"targets": leaf(length, 1, s.dim, like=s)}
    tensors |= {name: leaf(s.batch, 1, s.rank, s.dim, like=s) for name in ("keys", "values")}
    tensors["w_decomp"] = leaf(s.rank, 100, like=s)
    arguments = tensors | {"target_offsets": offsets(s, length)}
    return Call(recattn.lrea_attention, arguments, tuple(tensors), gradients(tensors["targets"]))


def lrea_absorbed_attention(s: Sizes, length: int) -> Call:
    states = {name: torch.rand(s.batch, 1, s.rank, s.dim, dtype=s.dtype) for name in ("state_keys", "state_values")}
    tensors = {"targets": torch.rand(length, 1, s.dim, dtype=s.dtype), **states}
    indices = {"slots": torch.arange(s.batch), "target_offsets": offsets(s, length)}
    return Call(recattn.lrea_absorbed_attention, tensors | indices)


def offsets(s: Sizes, length: int) -> Tensor:
    """The first target of each user, and their number."""
    return torch.arange(s.batch + 1) * length // s.batch


@dataclass(frozen=True)
class Case:
    """An operator on a path. `impl` is None where recattn itself chooses it."""

    op: str
    path: str
    make: Callable[[Sizes, int], Call]
    impl: str | None = None
    ragged: bool = False  # also timed with a new length in each call

    @property
    def sizes(self) -> Sizes:
        return Sizes(2, 4, 3, torch.bfloat16) if self.path == GPU else Sizes(1, 1, 1, torch.float32)

    @property
    def directions(self) -> tuple[str, ...]:
        return (FORWARD, TRAINING) if self.make(self.sizes, self.length).leaves else (FORWARD,)

    @property
    def length(self) -> int:
        """Small: on a CPU the kernels run, and so do PyTorch's operators between dry launches."""
        return 16 if self.path == GPU else 2


CASES = (
    Case("sink_attention", GPU, sink_attention, ragged=True),
    Case("sink_attention, padded", GPU, padded_sink_attention, ragged=True),
    Case("sink_attention, packed", GPU, packed_sink_attention, ragged=True),
    Case("inter_sink_bias", GPU, inter_sink_bias, "triton", ragged=True),
    Case("inter_sink_bias, then sink_attention", GPU, bias_and_attention, "triton"),
    Case("refined_attention", GPU, refined_attention, "triton", ragged=True),
    Case("wasserstein_attention", GPU, wasserstein_attention, "triton", ragged=True),
    Case("lrea_compress", GPU, lrea_compress, "triton", ragged=True),
    Case("lrea_attention", GPU, lrea_attention, "triton", ragged=True),
    Case("sink_attention", CPU, sink_attention),
    Case("sink_attention, padded", CPU, padded_sink_attention),
    Case("sink_attention, packed", CPU, packed_sink_attention),
    Case("inter_sink_bias", CPU, inter_sink_bias),
    Case("inter_sink_bias, then sink_attention", CPU, bias_and_attention),
    Case("refined_attention", CPU, refined_attention),
    Case("wasserstein_attention", CPU, wasserstein_attention),
    Case("lrea_compress", CPU, lrea_compress),
    Case("lrea_attention", CPU, lrea_attention),
    Case("lrea_absorbed_attention", CPU, lrea_absorbed_attention),
)
OPERATORS = tuple(dict.fromkeys(case.op for case in CASES))

NEW_LENGTH_RATIO = 1.5
_BY_DIRECTION = {FORWARD: HostGoal(2.5), TRAINING: HostGoal(8.0)}
GOALS: dict[tuple[str, str], dict[str, HostGoal]] = {
    **{
        (GPU, op): _BY_DIRECTION
        for op in (
            "sink_attention",
            "sink_attention, padded",
            "sink_attention, packed",
            "inter_sink_bias",
            "refined_attention",
            "wasserstein_attention",
        )
    },
    (GPU, "lrea_attention"): {TRAINING: HostGoal(12.0)},
    **{
        (CPU, op): {FORWARD: HostGoal(1.5), TRAINING: HostGoal(8.0)}
        for op in ("sink_attention", "sink_attention, padded", "sink_attention, packed")
    },
    **{
        (CPU, op): {FORWARD: HostGoal(1.5)}
        for op in (
            "inter_sink_bias",
            "refined_attention",
            "wasserstein_attention",
            "lrea_compress",
            "lrea_attention",
            "lrea_absorbed_attention",
        )
    },
}


@dataclass(frozen=True, kw_only=True)
class HostCost:
    """What one call costs the host. A field is None if it does not apply, or if the call failed."""

    host_of: str  # the operator
    path: str
    step: str  # the direction
    triton_launches: int | None = None
    torch_launches: int | None = None  # PyTorch operators that launch a kernel on a GPU
    host_us: float | None = None
    unit_us: float | None = None
    new_length_ratio: float | None = None  # time of a call with a new length, over that of a known one
    reason: str | None = None  # why it failed

    @property
    def units(self) -> float | None:
        return None if self.host_us is None else self.host_us / self.unit_us

    @property
    def goal(self) -> HostGoal | None:
        return GOALS.get((self.path, self.host_of), {}).get(self.step)

    @property
    def verdict(self) -> str | None:
        """Whether its goals are met; None without any."""
        met = [self.goal.judge(self.units)] if self.goal and self.units is not None else []
        if self.new_length_ratio is not None:
            met.append("met" if self.new_length_ratio <= NEW_LENGTH_RATIO else "missed")
        if self.reason is not None:
            return "failed"
        return None if not met else "missed" if "missed" in met else "met"


# --- Measuring ---


def measure(operators: Sequence[str] = OPERATORS, repeats: int = REPEATS) -> list[HostCost]:
    """The CPU path first: the dry driver, which stands in for a GPU from then on, cannot be removed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    costs, units = [], []
    for path in (CPU, GPU):
        launches = dry_driver.install() if path == GPU else None
        measured = [
            measure_calls(case, direction, launches, repeats)
            for case in CASES
            if case.path == path and case.op in operators
            for direction in case.directions
        ]
        # In rounds, so that a busy moment of the machine does not spoil all repeats of a call.
        for _ in range(ROUNDS):
            for i, (cost, call) in enumerate(measured):
                units.append(unit_us(repeats))
                if cost.reason is None:
                    with torch.set_grad_enabled(cost.step == TRAINING):
                        took = best_us(call, repeats)
                    measured[i] = replace(cost, host_us=min(took, cost.host_us or took)), call
        costs += [cost for cost, _ in measured]
    return [replace(cost, unit_us=min(units)) for cost in costs]


def measure_calls(
    case: Case, direction: str, launches: list[dry_driver.Launch] | None, repeats: int
) -> tuple[HostCost, Callable[[], object]]:
    """What can be measured once of an operator: its launches, new lengths. And the call to time."""

    def call_of(length: int) -> Callable[[], object]:
        return case.make(case.sizes, length).in_direction(direction, case.impl)

    cost, call = HostCost(host_of=case.op, path=case.path, step=direction), call_of(case.length)
    try:
        with torch.set_grad_enabled(direction == TRAINING):
            call()
            if launches is not None:
                launches.clear()
                call()
                dry_driver.expect_valid(case.op, launches)
                cost = replace(cost, triton_launches=len(launches), torch_launches=count_torch_launches(call))
            if case.ragged:
                cost = replace(cost, new_length_ratio=compare_new_lengths(call_of, repeats))
    except Exception as error:  # the other operators are still measured
        cost = replace(cost, reason=f"{type(error).__name__}: {error}".partition("\n")[0])
    return cost, call


def unit_us(repeats: int) -> float:
    """SDPA's smallest call: attention of two tokens, and the views that it takes."""
    q = torch.rand(2, 4, 64, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        return best_us(lambda: scaled_dot_product_attention(q[:1, :1, :2], q[:1, :1, :2], q[:1, :1, :2]), repeats)


def best_us(call: Callable[[], object], repeats: int) -> float:
    """Microseconds of the thread in a call: the least of the repeats' means."""
    call()
    once = _seconds([call])
    count = max(1, int(BATCH_SECONDS / max(once, 1e-6)))
    return 1e6 * min(_seconds([call] * count) / count for _ in range(repeats))


def compare_new_lengths(call_of: Callable[[int], Callable[[], object]], repeats: int) -> float:
    """Time of a call whose length has not come before, over that of a known length; each has tensors of its own."""
    for length in SEEN_LENGTHS:
        call_of(length)()
    calls = [call_of(length) for length in NEW_LENGTHS]
    new = min(_seconds(calls[start : start + BLOCK]) for start in range(0, len(calls), BLOCK))
    known = [call_of(KNOWN_LENGTH) for _ in range(BLOCK)]
    return new / min(_seconds(known) for _ in range(max(repeats, 2)))


def _seconds(calls: Sequence[Callable[[], object]]) -> float:
    """CPU time of the thread in all of the calls."""
    gc.disable()
    try:
        start = time.thread_time()
        for call in calls:
            call()
        return time.thread_time() - start
    finally:
        gc.enable()


def count_torch_launches(call: Callable[[], object]) -> int:
    """How many kernels of PyTorch's own a call would launch on a GPU: no views, no allocations."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(_kernels(event) for event in profile.events() if event.cpu_parent is None)


def _kernels(event) -> int:
    """Those of a profiled operator: its operators' within, or itself."""
    within = sum(_kernels(child) for child in event.cpu_children)
    return within or int(event.name.startswith("aten::") and _computes(event.name.removeprefix("aten::")))


NO_KERNEL = ("empty", "new_empty", "resize_", "set_", "_unsafe_view")


@cache
def _computes(name: str) -> bool:
    """Whether an operator of PyTorch that calls no other has a kernel."""
    packet = getattr(torch.ops.aten, name)
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    composite = any(
        torch._C._dispatch_has_kernel(each.name())
        and torch._C._dispatch_has_kernel_for_dispatch_key(each.name(), "CompositeImplicitAutograd")
        for each in overloads
    )
    return not (composite or any(each.is_view for each in overloads) or name.startswith(NO_KERNEL))

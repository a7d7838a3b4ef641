"""refined_attention against eager PyTorch, with and without SDPA for the last step, and two chained SDPA calls.

Limit: plain attention.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import recattn
from benchmarks.harness import jagged
from benchmarks.harness.goals import CeilingGoal, Goal, MemoryGoal, TimeGoal
from benchmarks.harness.registry import BACKWARD, COMPILED, EAGER, FORWARD, TRAINING, Cost, Inputs, register
from benchmarks.harness.workloads import CUDA, REFINED, Draw, RefinedWorkload
from recattn import reference
from recattn.ops.refined_attention import unsupported_reasons


def draw_inputs(workload: RefinedWorkload, draw: Draw) -> Inputs:
    n, dim, rank = workload.length, workload.dim, workload.rank or workload.length
    # Scores of order one. With larger ones the rounding of a single row decides the largest error of every
    # implementation.
    columns = 2 * rank if workload.mechanism == "stochastic" else rank  # [W^μ | W^Σ]
    widths = {"w_q": columns, "w_k": columns, "w_v": n}
    weights = {name: draw.normal(n, widths[name], std=n**-0.5 / 2) for name in weight_names(workload)}
    kind = {"mechanism": workload.mechanism, "source": workload.source}
    if not workload.histories:
        shape = workload.batch, workload.heads, n, dim
        return {**{name: draw.normal(*shape) for name in ("q", "k", "v")}, **weights, **kind, "seq_lens": None}
    histories = draw.histories.sample(workload.batch, longest=n)
    items = draw.embeddings(histories, dim, padding_side="left")  # [B, <= N, dim]
    items = F.pad(items, (0, 0, n - items.shape[1], 0))
    projections = (draw.normal(dim, workload.heads * dim, std=dim**-0.5) for _ in range(3))
    q, k, v = ((items @ w).unflatten(2, (-1, dim)).transpose(1, 2).contiguous() for w in projections)  # [B, H, N, D]
    lengths = draw.index([len(history) for history in histories])
    return {"q": q, "k": k, "v": v, **weights, **kind, "seq_lens": lengths, "padding_side": "left"}


def weight_names(workload: RefinedWorkload) -> tuple[str, ...]:
    return ("w_q", "w_k", "w_v") if workload.mechanism in ("value", "additive") else ("w_q", "w_k")


def cost(workload: RefinedWorkload, inputs: Inputs, direction: str) -> Cost:
    """The fewest matmuls known, over the visible (query, key) pairs. The backward has two for each of the forward.

    With a rank of N or more, A (W_q W_kᵀ) Aᵀ is cheaper. The causal part of that, and of the matmuls with W_v, is n³/3.
    """
    lengths = inputs["seq_lens"]
    n = (torch.full((workload.batch,), workload.length) if lengths is None else lengths).double()
    pairs, rank = n * (n + 1) / 2, inputs["w_q"].shape[1]
    refining = 6 * rank * pairs
    if workload.mechanism != "stochastic":
        refining = torch.minimum(refining, 2 * n**3 / 3)
    if "w_v" in inputs:
        refining += 2 * n**3 / 3
    flops = workload.heads * float((4 * workload.dim * pairs + refining).sum())
    weights = sum(inputs[name].nbytes for name in weight_names(workload))
    forward = 4 * inputs["q"].nbytes + weights
    if direction == FORWARD:
        return Cost(flops, forward)
    return Cost(3 * flops, forward + (forward + inputs["q"].nbytes) + (3 * inputs["q"].nbytes + weights))


CHAINED, PLAIN = "two chained SDPA", "plain SDPA"


def gpu_goals() -> Iterator[Goal]:
    """Speedup over each other implementation, and memory relative to it."""
    short = {FORWARD: (8, 3, 2), TRAINING: (6, 2.5, 1.5)}
    long = {FORWARD: (4, 2, 1.3), BACKWARD: (4, 2, 1.25)}
    for workload in REFINED:
        if workload.devices != CUDA or workload.mechanism != "simple":
            continue
        for direction, speeds in (short if workload.length <= 200 else long).items():
            if workload.length <= 64:
                # Eager PyTorch moves 5 to 6 times the bytes: no kernel is as many times as fast as `short` asks.
                fraction = 0.7 if direction == FORWARD else 0.6
                yield CeilingGoal(workload=workload.name, direction=direction, device="cuda", fraction=fraction)
                speeds = (4, *speeds[1:])
            for peer, speed in zip((EAGER, COMPILED, CHAINED), speeds, strict=True):
                goal = {"workload": workload.name, "direction": direction, "against": (peer,), "device": "cuda"}
                yield TimeGoal(**goal, time_ratio=1 / speed)
    for workload in ("gpu_200", "gpu_2048"):
        for direction in (FORWARD, TRAINING):
            goal = {"workload": workload, "direction": direction, "against": (PLAIN,), "device": "cuda"}
            yield TimeGoal(**goal, time_ratio=1.6)
    for peer, ratio in {EAGER: 1 / 15, COMPILED: 1 / 8, CHAINED: 1.0}.items():
        goal = {"workload": "gpu_2048", "direction": TRAINING, "against": (peer,), "device": "cuda"}
        yield MemoryGoal(**goal, memory_ratio=ratio)


OURS, REFERENCE = (partial(module.refined_attention, causal=True) for module in (recattn, reference))
REFINED_ATTENTION = register(
    "refined_attention",
    REFERENCE,
    draw_inputs,
    cost,
    grads=("q", "k", "v", "w_q", "w_k", "w_v"),
    workloads=REFINED,
    goals=(
        TimeGoal(workload="sasrec", direction=TRAINING, against=(EAGER,), time_ratio=1 / 1.5),
        MemoryGoal(workload="sasrec", direction=TRAINING, against=(EAGER,), memory_ratio=1 / 2),
        *(
            TimeGoal(
                workload=f"sasrec_stochastic_{source}",
                direction=direction,
                against=(EAGER, COMPILED),
                time_ratio=1 / 2,
            )
            for source in ("logits", "weights")
            for direction in (FORWARD, TRAINING)
        ),
        *gpu_goals(),
        *jagged.goals(REFINED),
    ),
)
REFINED_ATTENTION.add_recattn(OURS, unsupported_reasons)
jagged.add_recattn(REFINED_ATTENTION, OURS, REFERENCE, "qkv")


def prepare_mask(inputs: Inputs) -> Inputs:
    """Replace the lengths by `visible` [B, 1, N, N], which a model builds once for all layers; None if only causal."""
    inputs = dict(inputs)
    seq_lens = inputs.pop("seq_lens")
    if seq_lens is None:
        return {**inputs, "visible": None}
    inputs.pop("padding_side")
    return {**inputs, "visible": visible_pairs(inputs["q"].shape[2], seq_lens)}


def visible_pairs(n: int, seq_lens: Tensor) -> Tensor:
    """[B, 1, N, N] causal mask for sequences padded on the left."""
    valid = torch.arange(n, device=seq_lens.device) >= n - seq_lens[:, None]  # [B, N]
    return (causal_mask(n, seq_lens.device) & valid[:, :, None] & valid[:, None, :]).unsqueeze(1)


def causal_mask(n: int, device: torch.device) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=device).tril()


def masked_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1) * visible


def source_weights(q: Tensor, k: Tensor, source: str, visible: Tensor) -> Tensor:
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    return logits * visible if source == "logits" else masked_softmax(logits, visible)


def distances(mean_q: Tensor, std_q: Tensor, mean_k: Tensor, std_k: Tensor) -> Tensor:
    """W₂² of every query and key, [..., N, N]: means and deviations separately, as in STOSA's formulas."""

    def squared(x: Tensor, y: Tensor) -> Tensor:
        return x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2) - 2 * x @ y.mT

    return squared(mean_q, mean_k) + squared(std_q, std_k)


def gaussians(x: Tensor) -> tuple[Tensor, Tensor]:
    """Means, and standard deviations from covariances elu(x) + 1 of the second half."""
    mean, covariance = x.chunk(2, dim=-1)
    return mean, deviation(F.elu(covariance) + 1)


def deviation(covariance: Tensor) -> Tensor:
    return covariance.clamp(min=torch.finfo(covariance.dtype).tiny).sqrt()


@REFINED_ATTENTION.implementation(EAGER, prepare=prepare_mask)
def eager(q, k, v, w_q, w_k, mechanism, source, visible, w_v=None):
    visible = causal_mask(q.shape[2], q.device) if visible is None else visible
    a = source_weights(q, k, source, visible)
    if mechanism == "stochastic":
        refined = -distances(*gaussians(a @ w_q), *gaussians(a @ w_k)) / math.sqrt(w_q.shape[-1] / 2)
        return masked_softmax(refined, visible) @ v
    refined = (a @ w_q) @ (a @ w_k).mT / math.sqrt(w_q.shape[-1])
    if mechanism != "simple":
        refined = masked_softmax(refined, visible) @ (a @ w_v)
    if mechanism == "additive":
        refined = a + refined
    return masked_softmax(refined, visible) @ v


REFINED_ATTENTION.add_compiled(COMPILED, eager, prepare=prepare_mask)


def is_simple(workload: RefinedWorkload) -> bool:
    return workload.mechanism == "simple"


@REFINED_ATTENTION.implementation("eager, SDPA last", applies=is_simple, prepare=prepare_mask)
def eager_then_sdpa(q, k, v, w_q, w_k, mechanism, source, visible):
    a = source_weights(q, k, source, causal_mask(q.shape[2], q.device) if visible is None else visible)
    return causal_sdpa(a @ w_q, a @ w_k, v, visible)


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    if visible is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # SDPA needs a visible key in every row: padded rows see all keys, and are then set to zero.
    padded = ~visible.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, visible | padded).masked_fill(padded, 0)


def refined_weights(source: str, **inputs) -> Tensor:
    return reference.refined_attention(**inputs, source="weights")


@REFINED_ATTENTION.implementation(
    CHAINED, applies=is_simple, prepare=prepare_mask, reference=refined_weights, cpu_tier="full"
)
def two_chained_sdpa(q, k, v, w_q, w_k, mechanism, source, visible):
    """Computes source="weights" in any case, where A W is attention with W as values."""
    n, rank = q.shape[2], w_q.shape[1]
    w = torch.cat([w_q, w_k], dim=1)[:n].expand(*q.shape[:2], n, 2 * rank)
    queries, keys = causal_sdpa(q, k, w, visible).chunk(2, dim=-1)
    return causal_sdpa(queries, keys, v, visible)


def plain_attention(q, k, v, seq_lens, padding_side="right", **others):
    """Reference of plain attention: sink_attention without sinks."""
    no_sinks = torch.zeros(len(q), 0, dtype=torch.int64, device=q.device), q.new_zeros(len(q), 1, 0, 0)
    return reference.sink_attention(q, k, v, *no_sinks, causal=True, seq_lens=seq_lens, padding_side=padding_side)


@REFINED_ATTENTION.implementation(PLAIN, prepare=prepare_mask, reference=plain_attention, grads=("q", "k", "v"))
def plain_sdpa(q, k, v, visible, **others):
    return causal_sdpa(q, k, v, visible)

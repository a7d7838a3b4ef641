"""refined_attention against eager PyTorch, with and without SDPA for the last step; the limit is plain attention."""

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import recattn
from benchmarks.goals import TimeGoal
from benchmarks.registry import FORWARD, TRAINING, Cost, Inputs, Operator, register
from benchmarks.workloads import REFINED, Draw, RefinedWorkload
from recattn import reference
from recattn.ops.refined_attention import availability


def draw_inputs(workload: RefinedWorkload, draw: Draw) -> Inputs:
    n, dim = workload.length, workload.dim
    histories = draw.histories.sample(workload.batch, longest=n)
    items = draw.embeddings(histories, dim, padding_side="left")  # [B, <= N, dim]
    items = F.pad(items, (0, 0, n - items.shape[1], 0))
    projections = (draw.normal(dim, workload.heads * dim, std=dim**-0.5) for _ in range(3))
    q, k, v = ((items @ w).unflatten(2, (-1, dim)).transpose(1, 2).contiguous() for w in projections)  # [B, H, N, D]
    # Scores of order one: with larger ones the rounding of a single row decides the largest error of every contestant.
    weights = {name: draw.normal(n, n, std=n**-0.5 / 2) for name in weight_names(workload)}
    return {
        "q": q,
        "k": k,
        "v": v,
        **weights,
        "mechanism": workload.mechanism,
        "source": workload.source,
        "seq_lens": draw.index([len(history) for history in histories]),
        "padding_side": "left",
    }


def weight_names(workload: RefinedWorkload) -> tuple[str, ...]:
    return ("w_q", "w_k") if workload.mechanism == "simple" else ("w_q", "w_k", "w_v")


def cost(workload: RefinedWorkload, inputs: Inputs, direction: str) -> Cost:
    """The products of the equation over the visible pairs; the backward has two for each of the forward."""
    n = inputs["seq_lens"].double()
    pairs = float((n * (n + 1) / 2).sum()) * workload.heads
    rank = workload.length * (3 if workload.mechanism == "simple" else 5)
    flops = pairs * (4 * workload.dim + 2 * rank)
    weights = sum(inputs[name].nbytes for name in weight_names(workload))
    forward = 4 * inputs["q"].nbytes + weights
    if direction == FORWARD:
        return Cost(flops, forward)
    return Cost(3 * flops, forward + (forward + inputs["q"].nbytes) + (3 * inputs["q"].nbytes + weights))


REFINED_ATTENTION = register(
    Operator(
        "refined_attention",
        reference.refined_attention,
        draw_inputs,
        cost,
        grads=("q", "k", "v", "w_q", "w_k", "w_v"),
        baseline="eager",
        workloads=REFINED,
        goals=(TimeGoal(workload="sasrec", direction=TRAINING, against=("eager",), time_ratio=1 / 1.5),),
    )
)
REFINED_ATTENTION.add_recattn(recattn.refined_attention, availability)


def prepare_mask(inputs: Inputs) -> Inputs:
    """`visible` [B, 1, N, N] in place of the lengths, as a model builds it once for all its layers."""
    inputs = dict(inputs)
    seq_lens, _ = inputs.pop("seq_lens"), inputs.pop("padding_side")
    n, device = inputs["q"].shape[2], inputs["q"].device
    valid = torch.arange(n, device=device) >= n - seq_lens[:, None]  # [B, N]
    causal = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    return {**inputs, "visible": (causal & valid[:, :, None] & valid[:, None, :]).unsqueeze(1)}


def masked_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1) * visible


def source_weights(q: Tensor, k: Tensor, source: str, visible: Tensor) -> Tensor:
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    return logits * visible if source == "logits" else masked_softmax(logits, visible)


@REFINED_ATTENTION.implementation("eager", prepare=prepare_mask)
def eager(q, k, v, w_q, w_k, mechanism, source, visible, w_v=None):
    a = source_weights(q, k, source, visible)
    refined = (a @ w_q) @ (a @ w_k).mT / math.sqrt(w_q.shape[-1])
    if mechanism != "simple":
        refined = masked_softmax(refined, visible) @ (a @ w_v)
    if mechanism == "additive":
        refined = a + refined
    return masked_softmax(refined, visible) @ v


@cache
def compiled_eager():
    return torch.compile(eager, dynamic=False)


@REFINED_ATTENTION.implementation("eager, torch.compile", prepare=prepare_mask, tier="full")
def eager_compiled(**inputs):
    return compiled_eager()(**inputs)


@REFINED_ATTENTION.implementation(
    "eager, SDPA last", applies=lambda workload: workload.mechanism == "simple", prepare=prepare_mask
)
def eager_then_sdpa(q, k, v, w_q, w_k, mechanism, source, visible):
    a = source_weights(q, k, source, visible)
    return padded_sdpa(a @ w_q, a @ w_k, v, visible)


def padded_sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    # SDPA wants a visible key in every row: padded rows see all, and are set to zero.
    padded = ~visible.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, visible | padded).masked_fill(padded, 0)


def plain_attention(q, k, v, seq_lens, padding_side, **others):
    """The reference of sink_attention without sinks is that of plain attention."""
    no_sinks = seq_lens.new_zeros(len(seq_lens), 0), q.new_zeros(len(seq_lens), 1, 0, 0)
    return reference.sink_attention(q, k, v, *no_sinks, causal=True, seq_lens=seq_lens, padding_side=padding_side)


@REFINED_ATTENTION.implementation("plain SDPA", prepare=prepare_mask, reference=plain_attention, grads=("q", "k", "v"))
def plain_sdpa(q, k, v, visible, **others):
    return padded_sdpa(q, k, v, visible)

"""wasserstein_attention (STOSA's attention between Gaussians, and its refinement) against eager PyTorch.

The two outputs are concatenated into one tensor, for every implementation but packed and nested ones: those are
concatenated when they are checked.
"""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import recattn
from benchmarks.harness import jagged
from benchmarks.harness.goals import TimeGoal
from benchmarks.harness.registry import COMPILED, EAGER, FORWARD, TRAINING, Cost, Inputs, register
from benchmarks.harness.workloads import WASSERSTEIN, Draw, RefinedWorkload
from benchmarks.operators.refined_attention import deviation, distances, gaussians, masked_softmax, visible_pairs
from recattn import reference
from recattn.ops.wasserstein_attention import unsupported_reasons

GAUSSIANS = tuple(f"{part}_{of}" for of in "qkv" for part in ("mean", "cov"))


def draw_inputs(workload: RefinedWorkload, draw: Draw) -> Inputs:
    """Means and covariances of queries, keys and values. As in STOSA, a covariance is elu(x) + 1."""
    n, dim = workload.length, workload.dim
    histories = draw.histories.sample(workload.batch, longest=n)
    lengths = draw.index([len(history) for history in histories])
    inputs: Inputs = {"seq_lens": lengths, "padding_side": "left"}
    for name in GAUSSIANS:
        items = draw.embeddings(histories, dim * workload.heads, padding_side="left")  # [B, <= N, H D]
        items = F.pad(items / 2, (0, 0, n - items.shape[1], 0))  # scores of order one, as for refined_attention
        x = items.unflatten(2, (-1, dim)).transpose(1, 2).contiguous()
        inputs[name] = x if name.startswith("mean") else F.elu(x) + 1
    if workload.mechanism == "stochastic":
        inputs |= {name: draw.normal(n, 2 * n, std=n**-0.5 / 4) for name in ("w_q", "w_k")}
    return inputs


def cost(workload: RefinedWorkload, inputs: Inputs, direction: str) -> Cost:
    """Over the visible (query, key) pairs. The backward has two matmuls for each of the forward.

    Distances are one matmul of concatenated means and deviations, or, if refined, of the projections of A.
    """
    n = inputs["seq_lens"].double()
    pairs = workload.heads * float((n * (n + 1) / 2).sum())
    columns = inputs["w_q"].shape[1] if "w_q" in inputs else 0
    flops = (4 * workload.dim + 6 * columns + 4 * workload.dim) * pairs
    weights = sum(inputs[name].nbytes for name in ("w_q", "w_k") if name in inputs)
    forward = 8 * inputs["mean_q"].nbytes + weights
    return Cost(flops, forward) if direction == FORWARD else Cost(3 * flops, 2 * forward + 8 * inputs["mean_q"].nbytes)


def side_by_side(outputs: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat(outputs, dim=-1)


OURS, REFERENCE = (partial(module.wasserstein_attention, causal=True) for module in (recattn, reference))
WASSERSTEIN_ATTENTION = register(
    "wasserstein_attention",
    lambda **inputs: side_by_side(REFERENCE(**inputs)),
    draw_inputs,
    cost,
    grads=(*GAUSSIANS, "w_q", "w_k"),
    workloads=WASSERSTEIN,
    goals=(
        *(
            TimeGoal(
                workload=workload.name,
                direction=direction,
                against=(EAGER, COMPILED),
                time_ratio=1 / 1.5 if workload.mechanism == "plain" else 1 / 2,
            )
            for workload in WASSERSTEIN
            if "cpu" in workload.devices and workload.tier != "quick"
            for direction in (FORWARD, TRAINING)
        ),
        *jagged.goals(WASSERSTEIN),
    ),
)
WASSERSTEIN_ATTENTION.add_recattn(lambda **inputs: side_by_side(OURS(**inputs)), unsupported_reasons)
jagged.add_recattn(WASSERSTEIN_ATTENTION, OURS, REFERENCE, GAUSSIANS)


def with_visible(inputs: Inputs) -> Inputs:
    """Replace the lengths by `visible` [B, 1, N, N]."""
    inputs = dict(inputs)
    seq_lens = inputs.pop("seq_lens")
    inputs.pop("padding_side")
    return {**inputs, "visible": visible_pairs(inputs["mean_q"].shape[2], seq_lens)}


@WASSERSTEIN_ATTENTION.implementation(EAGER, prepare=with_visible)
def eager(mean_q, cov_q, mean_k, cov_k, mean_v, cov_v, visible, w_q=None, w_k=None):
    scores = -distances(mean_q, deviation(cov_q), mean_k, deviation(cov_k)) / math.sqrt(mean_q.shape[-1])
    if w_q is not None:
        a = scores * visible
        scores = -distances(*gaussians(a @ w_q), *gaussians(a @ w_k)) / math.sqrt(w_q.shape[-1] / 2)
    p = masked_softmax(scores, visible)
    return torch.cat([p @ mean_v, p.square() @ cov_v], dim=-1)


WASSERSTEIN_ATTENTION.add_compiled(COMPILED, eager, prepare=with_visible)

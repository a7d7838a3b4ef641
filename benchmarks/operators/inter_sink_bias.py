"""inter_sink_bias, the bias of sink_attention, against eager PyTorch."""

import math

import torch
from torch import Tensor

import recattn
from benchmarks.harness.goals import TimeGoal
from benchmarks.harness.registry import COMPILED, EAGER, FORWARD, TRAINING, Cost, Inputs, register
from benchmarks.harness.workloads import INTER_SINK_BIAS, Draw, SinkWorkload
from recattn import reference
from recattn.ops.inter_sink_bias import unsupported_reasons

BIAS_SCALE = 10.0


def draw_inputs(workload: SinkWorkload, draw: Draw) -> Inputs:
    """Every sequence has 1 to M sinks; the rest is padding."""
    shape = workload.batch, workload.heads, workload.sinks, workload.dim
    counts = torch.randint(1, workload.sinks + 1, (workload.batch,), generator=draw.structure)
    return {
        "q_s": draw.normal(*shape),
        "k_s": draw.normal(*shape),
        "sink_mask": draw.index(torch.arange(workload.sinks) < counts[:, None], torch.bool),
        "bias_scale": BIAS_SCALE,
        "causal": workload.causal,
    }


def cost(workload: SinkWorkload, inputs: Inputs, direction: str) -> Cost:
    """Over the real sinks. The backward repeats the forward, and has two matmuls for each of it."""
    q, counts = inputs["q_s"], inputs["sink_mask"].sum(1).double()
    pairs = float((counts * (counts + 1) / 2 if workload.causal else counts.square()).sum())
    flops = 2 * workload.heads * workload.dim * pairs
    bias = workload.batch * workload.sinks**2 * 4
    forward = 2 * q.nbytes + bias
    return Cost(flops, forward) if direction == FORWARD else Cost(4 * flops, 2 * forward + 2 * q.nbytes)


BIAS = register(
    "inter_sink_bias",
    reference.inter_sink_bias,
    draw_inputs,
    cost,
    grads=("q_s", "k_s"),
    workloads=INTER_SINK_BIAS,
    goals=tuple(
        TimeGoal(workload=workload, direction=direction, against=(EAGER, COMPILED), time_ratio=1 / 1.5)
        for workload in ("ctr_sink_bias", "small")
        for direction in (FORWARD, TRAINING)
    ),
)
BIAS.add_recattn(recattn.inter_sink_bias, unsupported_reasons)


@BIAS.implementation(EAGER)
def eager(q_s: Tensor, k_s: Tensor, sink_mask: Tensor, bias_scale: float, causal: bool) -> Tensor:
    visible = sink_mask[:, None, None, :] & sink_mask[:, None, :, None]
    if causal:
        visible = visible & torch.ones_like(visible[0, 0]).tril()
    scores = (q_s @ k_s.mT).float() / math.sqrt(q_s.shape[-1])
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
    return bias_scale * weights.mean(1, keepdim=True) * visible


BIAS.add_compiled(COMPILED, eager)

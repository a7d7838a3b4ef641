"""sink_attention against eager PyTorch and SDPA with a dense bias; the limit is attention without the bias."""

import math
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import recattn
from benchmarks.registry import FORWARD, TRAINING, Cost, Goal, Inputs, Operator, register
from benchmarks.workloads import SINK, Draw, SinkWorkload, offsets
from recattn import reference
from recattn.ops.sink_attention import availability

# CTR-Sink scales its softmax-ed biases by 10 in its encoders.
BIAS_SCALE = 10


def draw_inputs(workload: SinkWorkload, draw: Draw) -> Inputs:
    if workload.histories:
        return _packed_histories(workload, draw)
    batch, length, dim = workload.batch, workload.length, workload.dim
    spots = [torch.randperm(length, generator=draw.structure)[: workload.sinks].sort().values for _ in range(batch)]
    return {
        "q": draw.normal(batch, workload.heads, length, dim),
        "k": draw.normal(batch, workload.kv_heads, length, dim),
        "v": draw.normal(batch, workload.kv_heads, length, dim),
        "sink_positions": draw.index(torch.stack(spots)),
        "inter_sink_bias": _bias(workload.batch, workload.sinks, draw),
        "causal": workload.causal,
    }


def _packed_histories(workload: SinkWorkload, draw: Draw) -> Inputs:
    per_behavior, dim = workload.tokens_per_behavior, workload.dim
    histories = draw.histories.sample(workload.batch, longest=workload.sinks)
    behaviors = torch.tensor([len(history) for history in histories])
    # A token is its behaviour's embedding plus one of its own.
    tokens = draw.embeddings([torch.cat(histories)], dim)[0].repeat_interleave(per_behavior, dim=0)  # [T, D]
    tokens = tokens + draw.normal(*tokens.shape)
    projections = (draw.normal(dim, heads * dim, std=(2 * dim) ** -0.5) for heads in _head_counts(workload))
    q, k, v = ((tokens @ projection).unflatten(1, (-1, dim)) for projection in projections)
    sinks = int(behaviors.max())
    order = torch.arange(sinks).expand(len(behaviors), sinks)
    positions = ((order + 1) * per_behavior - 1).masked_fill(order >= behaviors[:, None], -1)
    return {
        "q": q,
        "k": k,
        "v": v,
        "sink_positions": draw.index(positions),
        "inter_sink_bias": _bias(workload.batch, sinks, draw),
        "causal": workload.causal,
        "cu_seqlens": draw.index(offsets(behaviors * per_behavior)),
    }


def _head_counts(workload: SinkWorkload) -> tuple[int, int, int]:
    return workload.heads, workload.kv_heads, workload.kv_heads


def _bias(batch: int, sinks: int, draw: Draw) -> Tensor:
    return BIAS_SCALE * draw.normal(batch, 1, sinks, sinks).softmax(-1)


def cost(workload: SinkWorkload, inputs: Inputs, direction: str) -> Cost:
    """4·D operations a visible pair and head; the backward counts 2.5 forwards, as FlashAttention's figures do."""
    q, k, v, bias = (inputs[name] for name in ("q", "k", "v", "inter_sink_bias"))
    cu_seqlens = inputs.get("cu_seqlens")
    lengths = [workload.length] * workload.batch if cu_seqlens is None else cu_seqlens.diff().tolist()
    pairs = sum(n * (n + 1) / 2 if workload.causal else n * n for n in lengths)
    flops = 4 * workload.dim * workload.heads * pairs
    forward = 2 * q.nbytes + k.nbytes + v.nbytes + bias.nbytes
    if direction == FORWARD:
        return Cost(flops, forward)
    # The backward reads those and dO, and writes a gradient for each input.
    return Cost(3.5 * flops, forward + (forward + q.nbytes) + (q.nbytes + k.nbytes + v.nbytes + bias.nbytes))


SINK_ATTENTION = register(
    Operator(
        "sink_attention",
        reference.sink_attention,
        draw_inputs,
        cost,
        grads=("q", "k", "v", "inter_sink_bias"),
        baseline="eager",
        workloads=SINK,
        goals=(
            Goal("headline", FORWARD, against="unbiased SDPA", time_ratio=1.10),
            Goal("headline", TRAINING, against="unbiased SDPA", time_ratio=1.15),
        ),
    )
)
SINK_ATTENTION.add_recattn(recattn.sink_attention, availability)


def pad(inputs: Inputs) -> Inputs:
    """Packed sequences as [B, H, N, D] with `valid` [B, N]; other inputs as they are."""
    inputs = dict(inputs)
    cu_seqlens = inputs.pop("cu_seqlens", None)
    if cu_seqlens is None:
        return inputs
    lengths = cu_seqlens.diff().tolist()
    for name in ("q", "k", "v"):
        sequences = inputs[name].split(lengths)
        inputs[name] = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).transpose(1, 2).contiguous()
    position = torch.arange(max(lengths), device=cu_seqlens.device)
    return {**inputs, "valid": position < cu_seqlens.diff()[:, None]}


def unpad(output: Tensor, inputs: Inputs) -> Tensor:
    if "cu_seqlens" not in inputs:
        return output
    return output.transpose(1, 2)[pad(inputs)["valid"]]


def dense_bias(q: Tensor, sink_positions: Tensor, inter_sink_bias: Tensor, valid: Tensor | None) -> Tensor:
    """[B, 1 or Hq, N, N]: the bias at the sinks, -inf at padded keys, else 0."""
    batch, heads = inter_sink_bias.shape[:2]
    length = q.shape[2]
    # A position of -1 is the last row and column, which are cut off.
    extra = 0 if valid is None else 1
    dense = inter_sink_bias.new_zeros(batch, heads, length + extra, length + extra)
    b = torch.arange(batch, device=q.device)[:, None, None, None]
    h = torch.arange(heads, device=q.device)[:, None, None]
    dense[b, h, sink_positions[:, None, :, None], sink_positions[:, None, None, :]] = inter_sink_bias
    dense = dense[..., :length, :length]
    return dense if valid is None else dense.masked_fill(~valid[:, None, None, :], -math.inf)


def future(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


@SINK_ATTENTION.implementation("eager", prepare=pad, restore=unpad)
def eager(q, k, v, sink_positions, inter_sink_bias, causal, valid=None):
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + dense_bias(q, sink_positions, inter_sink_bias, valid)
    if causal:
        scores = scores.masked_fill(future(q.shape[2], q.device), -math.inf)
    return scores.softmax(-1) @ v


@SINK_ATTENTION.implementation("SDPA, dense bias", prepare=pad, restore=unpad)
def sdpa_dense_bias(q, k, v, sink_positions, inter_sink_bias, causal, valid=None):
    mask = dense_bias(q, sink_positions, inter_sink_bias, valid)
    if causal:
        mask = mask.masked_fill(future(q.shape[2], q.device), -math.inf)
    return F.scaled_dot_product_attention(q, k, v, mask.to(q.dtype), enable_gqa=q.shape[1] != k.shape[1])


@SINK_ATTENTION.implementation("SDPA, dense bias, one by one", applies=lambda workload: workload.histories)
def sdpa_one_by_one(q, k, v, sink_positions, inter_sink_bias, causal, cu_seqlens):
    outputs = []
    bounds, sinks = cu_seqlens.tolist(), (sink_positions >= 0).sum(1).tolist()
    for b, (start, stop) in enumerate(pairwise(bounds)):
        sequence = (x[start:stop].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        positions = sink_positions[b : b + 1, : sinks[b]]
        bias = inter_sink_bias[b : b + 1, :, : sinks[b], : sinks[b]]
        output = sdpa_dense_bias(*sequence, positions, bias, causal)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


@cache
def compiled_eager():
    return torch.compile(eager, dynamic=False)


@SINK_ATTENTION.implementation("eager, torch.compile", prepare=pad, restore=unpad, tier="full")
def eager_compiled(**inputs):
    return compiled_eager()(**inputs)


@cache
def compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def prepare_flex(inputs: Inputs) -> Inputs:
    """With sink_of [B, N]: which sink a token is, -1 if none."""
    batch, sinks = inputs["sink_positions"].shape
    sink_of = torch.full((batch, inputs["q"].shape[2]), -1, device=inputs["q"].device)
    order = torch.arange(sinks, device=sink_of.device).expand(batch, sinks)
    return {**inputs, "sink_of": sink_of.scatter(1, inputs["sink_positions"], order)}


@SINK_ATTENTION.implementation(
    "FlexAttention",
    applies=lambda workload: not (workload.histories or workload.causal),
    prepare=prepare_flex,
    forward_only=lambda device: device.type == "cpu",  # its backward does not exist there
    tier="full",
)
def flex(q, k, v, sink_positions, inter_sink_bias, causal, sink_of):
    def add_bias(score, b, h, i, j):
        row, column = sink_of[b, i], sink_of[b, j]
        bias = inter_sink_bias[b, 0, row.clamp(min=0), column.clamp(min=0)]
        return score + torch.where((row >= 0) & (column >= 0), bias, 0)

    return compiled_flex_attention()(q, k, v, score_mod=add_bias, enable_gqa=q.shape[1] != k.shape[1])


def without_bias(q, k, v, sink_positions, inter_sink_bias, **options):
    return reference.sink_attention(q, k, v, sink_positions[:, :0], inter_sink_bias[..., :0, :0], **options)


@SINK_ATTENTION.implementation(
    "unbiased SDPA", prepare=pad, restore=unpad, reference=without_bias, grads=("q", "k", "v")
)
def unbiased_sdpa(q, k, v, sink_positions, inter_sink_bias, causal, valid=None):
    mask = None if valid is None else valid[:, None, None, :]
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)


def flash_attention_missing(workload: SinkWorkload, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it needs a CUDA device"
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        return "flash_attn is not installed"
    return None


@SINK_ATTENTION.implementation(
    "unbiased FlashAttention",
    applies=lambda workload: not workload.histories,
    unavailable=flash_attention_missing,
    prepare=lambda inputs: {**inputs, **{name: inputs[name].transpose(1, 2) for name in ("q", "k", "v")}},
    restore=lambda output, inputs: output.transpose(1, 2),
    reference=without_bias,
    grads=("q", "k", "v"),
    tier="full",
)
def unbiased_flash_attention(q, k, v, sink_positions, inter_sink_bias, causal):
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=causal)

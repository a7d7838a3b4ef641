"""The correction path of sink_attention on an unbiased attention in plain PyTorch, and inputs for it."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from recattn._options import SinkAttentionOptions
from recattn.reference.sink_attention import sink_attention as reference
from recattn.reference.sink_attention import valid_tokens, visible_pairs
from recattn.triton_kernels.sink_attention import (
    CorrectionConfig,
    Lengths,
    PairsConfig,
    SinkInputs,
    as_lengths,
    launch_sink_attention_correction_delta,
    launch_sink_attention_correction_fwd,
    launch_sink_attention_pairs_bwd,
)
from tests.helpers.interpreted import DEVICE

SCALE = 0.3
# The interpreter's time goes by the number of tiles.
CORRECTION_TILES = CorrectionConfig(64, 64, 32, num_warps=4, num_stages=1) if DEVICE == "cpu" else None
PAIRS_TILES = PairsConfig(64, 64, 32, num_warps=4, num_stages=1) if DEVICE == "cpu" else None


def random_inputs(
    N: int,
    M: int,
    *,
    B: int = 2,
    Hq: int = 2,
    Hkv: int = 1,
    D: int = 32,
    Dv: int | None = None,
    bias_heads: int = 1,
    dtype: torch.dtype = torch.float32,
    causal: bool = False,
    lengths: list[int] | None = None,
    layout: str = "right",
) -> dict:
    """Arguments of the reference. Sinks have random positions; each sequence has one sink less than the one before.

    `lengths` are those of B sequences; `layout` is "right", "window" (padding on both sides) or "packed".
    """
    B = B if lengths is None else len(lengths)
    tokens = (B, N)
    extents = [N] * B
    inputs = {"causal": causal, "scale": SCALE}
    if layout == "packed":
        extents = lengths
        tokens = (sum(lengths),)
        inputs["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    elif lengths is not None:
        inputs["seq_lens"] = torch.tensor(lengths)
        if layout == "window":
            inputs["seq_starts"] = (N - inputs["seq_lens"]) * 2 // 3
    sink_positions = torch.full((B, M), -1)
    for b, extent in enumerate(extents):
        sinks = torch.randperm(extent)[: max(M - b, 0)].sort().values
        sink_positions[b, : len(sinks)] = sinks
    for name, heads, width in [("q", Hq, D), ("k", Hkv, D), ("v", Hkv, Dv or D)]:
        x = torch.randn(*tokens, heads, width).to(dtype)
        inputs[name] = x if layout == "packed" else x.transpose(1, 2).contiguous()
    inputs |= {"sink_positions": sink_positions, "inter_sink_bias": torch.randn(B, bias_heads, M, M)}
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in inputs.items()}


BIASES = {
    "30": lambda bias: 30 * bias,
    "-8": lambda bias: torch.full_like(bias, -8.0),
    "-50": lambda bias: torch.full_like(bias, -50.0),
    "-50 and less": lambda bias: bias - 50,
    "-1.5": lambda bias: bias - 1.5,
    "+200": lambda bias: bias + 200,
    "200": lambda bias: 200 * bias,
    "small": lambda bias: 1e-3 * bias,
    "some -inf": lambda bias: bias.masked_fill(bias > 0.5, -math.inf),
    "some -inf, others 30": lambda bias: 30 * bias.masked_fill(bias > 0.5, -math.inf),
    "all -inf": lambda bias: torch.full_like(bias, -math.inf),
}


half_precision_biases = pytest.mark.parametrize("bias", ["-50", "200", "some -inf", "all -inf"])


def with_bias(inputs: dict, name: str) -> dict:
    """The same inputs with their inter_sink_bias changed as BIASES says."""
    return inputs | {"inter_sink_bias": BIASES[name](inputs["inter_sink_bias"])}


def finite_lse(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of a row that sees no key, -inf, has no error to measure."""
    return out, lse.masked_fill(lse.isneginf(), 0.0)


def reference_attention(*, correction_tiles=None, pairs_tiles=None, **inputs) -> tuple[Tensor, Tensor]:
    out, lse = reference(**inputs, return_lse=True)
    return finite_lse(out, lse.T if "cu_seqlens" in inputs else lse)


def corrected_attention(
    q,
    k,
    v,
    sink_positions,
    inter_sink_bias,
    sink_logits=None,
    causal=False,
    seq_lens=None,
    seq_starts=None,
    cu_seqlens=None,
    scale=SCALE,
    correction_tiles=CORRECTION_TILES,
    pairs_tiles=PAIRS_TILES,
) -> tuple[Tensor, Tensor]:
    settings = {"causal": causal, "scale": scale}
    tensors = (q, k, v, sink_positions, inter_sink_bias, sink_logits, seq_lens, seq_starts, cu_seqlens)
    return finite_lse(*CorrectedAttention.apply(*tensors, settings, correction_tiles, pairs_tiles))


class CorrectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        sink_positions,
        inter_sink_bias,
        sink_logits,
        seq_lens,
        seq_starts,
        cu_seqlens,
        settings,
        correction_tiles,
        pairs_tiles,
    ):
        context = (seq_lens, seq_starts, cu_seqlens)
        out, lse = unbiased_attention(q, k, v, sink_logits, *context, **settings)
        sink_stats = launch_sink_attention_correction_fwd(
            *(q, k, v, out, lse, SinkInputs(sink_positions, inter_sink_bias, sink_logits), as_lengths(*context)),
            options=SinkAttentionOptions(**settings),
            config=correction_tiles,
        )
        # Nothing reads the statistics of ignored sinks.
        sink_stats = sink_stats.masked_fill(sink_stats[1] == 0, math.nan)
        ctx.save_for_backward(q, k, v, out, lse, sink_positions, inter_sink_bias, sink_stats, *context)
        ctx.settings, ctx.pairs_tiles = settings, pairs_tiles
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        q, k, v, out, lse, sink_positions, inter_sink_bias, sink_stats, *context = ctx.saved_tensors
        backend_lse = lse.clone()
        sink_delta = launch_sink_attention_correction_delta(
            *(out, dout, sink_positions, sink_stats, backend_lse, as_lengths(*context)),
        )
        dq, dk, dv = unbiased_gradients(dout, q, k, v, out, backend_lse, *context, **ctx.settings)
        dbias = launch_sink_attention_pairs_bwd(
            *(q, k, v, dout, sink_stats, sink_delta, (dq, dk, dv)),
            *(SinkInputs(sink_positions, inter_sink_bias), as_lengths(*context)),
            options=SinkAttentionOptions(**ctx.settings),
            corrects=True,
            config=ctx.pairs_tiles,
        )
        return dq, dk, dv, None, dbias.to(inter_sink_bias.dtype), *[None] * 7


# --- The backend: an attention without bias ---


def unbiased_attention(q, k, v, sink_logits, seq_lens, seq_starts, cu_seqlens, *, causal, scale):
    """out in the inputs' dtype and lse in float32, computed in float64 so that all error is the kernels' own."""
    packed = cu_seqlens is not None
    scores = unbiased_scores(q, k, seq_lens, seq_starts, cu_seqlens, causal, scale)
    lse = scores.logsumexp(-1)
    if sink_logits is not None:
        lse = torch.logaddexp(lse, sink_logits[:, None]).masked_fill(lse.isneginf(), -math.inf)
    weights = (scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    out = (weights @ expand_heads(dense(v, packed), q.shape[1])).to(q.dtype)
    lse = lse.float()
    return (out[0].transpose(0, 1).contiguous(), lse[0].T.contiguous()) if packed else (out, lse)


def unbiased_gradients(dout, q, k, v, out, lse, seq_lens, seq_starts, cu_seqlens, *, causal, scale):
    """dq, dk, dv, from the out and lse of another attention. Rows whose lse is ±inf have no gradient."""
    packed = cu_seqlens is not None
    heads, kv_heads = q.shape[1], k.shape[1]
    scores = unbiased_scores(q, k, seq_lens, seq_starts, cu_seqlens, causal, scale)
    lse = dense(lse[..., None], packed)
    weights = (scores - lse.masked_fill(lse.isinf(), math.inf)).exp()
    dout_, q_, k_, v_, out_ = (dense(x, packed) for x in (dout, q, k, v, out))
    k_, v_ = expand_heads(k_, heads), expand_heads(v_, heads)
    dscores = scale * weights * (dout_ @ v_.mT - (dout_ * out_).sum(-1, keepdim=True))
    dq = dscores @ k_
    dk, dv = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in (dscores.mT @ q_, weights.mT @ dout_))
    return [(x[0].transpose(0, 1) if packed else x).contiguous().to(q.dtype) for x in (dq, dk, dv)]


def unbiased_scores(q, k, seq_lens, seq_starts, cu_seqlens, causal, scale) -> Tensor:
    """[B, Hq, N, N] in float64, -inf at invisible keys. Packed sequences are one sequence of T tokens."""
    packed = cu_seqlens is not None
    q, k = dense(q, packed), dense(k, packed)
    B, N = q.shape[0], q.shape[2]
    visible = visible_pairs(valid_tokens(B, N, seq_lens, seq_starts, q.device), causal)
    if packed:
        sequence = torch.bucketize(torch.arange(N, device=q.device), cu_seqlens[1:], right=True)
        visible = visible & (sequence[:, None] == sequence)
    return (scale * q @ expand_heads(k, q.shape[1]).mT).masked_fill(~visible, -math.inf)


def dense(x: Tensor, packed: bool) -> Tensor:
    """x as [B, H, N, D] in float64; packed [T, H, D] becomes B = 1. NaN, which padding may hold, becomes zero."""
    x = (x.transpose(0, 1).unsqueeze(0) if packed else x).double()
    return x.masked_fill(x.isnan(), 0.0)


def expand_heads(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


# --- What a test does to inputs ---


def live_sinks(inputs: dict, b: int) -> Tensor:
    """Which sinks of sequence b are valid, [M]."""
    positions = inputs["sink_positions"][b]
    if "cu_seqlens" in inputs:
        start, stop = list(pairwise(inputs["cu_seqlens"].tolist()))[b]
        first, end = 0, stop - start
    else:
        N = inputs["q"].shape[2]
        length = inputs["seq_lens"][b].item() if "seq_lens" in inputs else N
        first = inputs["seq_starts"][b].item() if "seq_starts" in inputs else 0
        end = first + length
    return (positions >= first) & (positions < end)


def lengths_of(inputs: dict) -> Lengths:
    return as_lengths(*(inputs.get(name) for name in Lengths._fields))


def padding_of(inputs: dict) -> Tensor:
    """[B, 1, N, 1], True at padding."""
    q = inputs["q"]
    valid = valid_tokens(q.shape[0], q.shape[2], inputs["seq_lens"], inputs.get("seq_starts"), q.device)
    return ~valid[:, None, :, None]


def strided_copy(x: Tensor) -> Tensor:
    """The same values with the axes reversed in memory and NaN, or the largest integer, between them."""
    gap = math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    memory = x.new_full((*x.shape[::-1][:-1], 3 * x.shape[0]), gap)
    view = memory[..., ::3].permute(*reversed(range(x.dim())))
    return view.copy_(x)

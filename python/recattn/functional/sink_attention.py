"""Softmax attention with a learned additive bias between sink tokens (CTR-Sink, arXiv 2508.03668)."""

import math
from typing import Literal, overload

from torch import Tensor

from recattn import _check as check
from recattn import reference
from recattn._dispatch import parse_implementation, select
from recattn._options import SinkAttentionOptions
from recattn._typing import PaddingSide, SinkAttentionImpl
from recattn.functional import validation
from recattn.functional._autocast import autocast_inputs, autocast_may_be_on
from recattn.functional._nested import Packed, accepts_nested, nest_heads
from recattn.functional._sequences import expect_qkv, expect_windows, validate_layout, window_starts
from recattn.ops import sink_attention as ops
from recattn.ops._library import apply, distinct
from recattn.ops._support import draw_dropout_seed
from recattn.ops.backends import BACKENDS

# The tensors of a dense and of a packed call; what does not fit is checked by `_validate`, which says why.
_TENSORS = {"sink_positions": (check.INTEGER, "B M?"), "inter_sink_bias": (check.FLOATING, "B 1|Hq M M?")}
_TENSORS |= {"sink_logits": (check.FLOATING, "Hq?")}
_DENSE = check.Layouts(
    q=(check.FLOATING, "B Hq N D"),
    k=(check.SAME, "B Hkv N D"),
    v=(check.SAME, "B Hkv N Dv"),
    **_TENSORS,
    seq_lens=(check.INTEGER, "B?"),
    seq_starts=(check.INTEGER, "B?"),
)
_PACKED = check.Layouts(
    q=(check.FLOATING, "T Hq D"),
    k=(check.SAME, "T Hkv D"),
    v=(check.SAME, "T Hkv Dv"),
    cu_seqlens=(check.INTEGER, "B+1"),
    **_TENSORS,
)


def _nest(packed: Packed, out: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    """Nested [B, Hq, j, Dv], and where it is given the log-sum-exp [B, Hq, j], from [T, Hq, Dv] and [Hq, T]."""
    if isinstance(out, Tensor):
        return nest_heads(packed, out)
    return nest_heads(packed, out[0]), packed.nest(out[1].transpose(0, 1), ragged_axis=2)


@overload
def sink_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_positions: Tensor | None = None,
    inter_sink_bias: Tensor | None = None,
    *,
    sink_logits: Tensor | None = None,
    causal: bool = False,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    padding_side: PaddingSide = "right",
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    max_seqlen: int | None = None,
    impl: SinkAttentionImpl | None = None,
) -> Tensor: ...
@overload
def sink_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_positions: Tensor | None = None,
    inter_sink_bias: Tensor | None = None,
    *,
    sink_logits: Tensor | None = None,
    causal: bool = False,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    padding_side: PaddingSide = "right",
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: Literal[True],
    max_seqlen: int | None = None,
    impl: SinkAttentionImpl | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def sink_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_positions: Tensor | None = None,
    inter_sink_bias: Tensor | None = None,
    *,
    sink_logits: Tensor | None = None,
    causal: bool = False,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    padding_side: PaddingSide = "right",
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool,
    max_seqlen: int | None = None,
    impl: SinkAttentionImpl | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
@accepts_nested("q", "k", "v", ragged_axis=2, nest=_nest)
def sink_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_positions: Tensor | None = None,
    inter_sink_bias: Tensor | None = None,
    *,
    sink_logits: Tensor | None = None,
    causal: bool = False,
    seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    padding_side: PaddingSide = "right",
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    max_seqlen: int | None = None,
    impl: SinkAttentionImpl | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with a learned bias between sink tokens:

        O = softmax(scale · Q Kᵀ + mask + β) V
        β[b, h, i, j] = inter_sink_bias[b, h, s(i), s(j)]   if tokens i and j are both sinks, else 0

    A sink here is a token between two behaviours of a user (CTR-Sink, arXiv 2508.03668; the formula is that of its
    official code). The "attention sink" of other works, a logit in the softmax's denominator, is `sink_logits`.

    Args:
        q: [B, Hq, N, D], float64, float32, bfloat16 or float16; packed: [T, Hq, D]; or nested (torch.jagged)
            [B, Hq, j, D], which is computed packed.
        k, v: [B, Hkv, N, D] and [B, Hkv, N, Dv], q's dtype, Hq a multiple of Hkv; packed: [T, Hkv, D] and [T, Hkv, Dv];
            or nested as q is.
        sink_positions: [B, M] integer. Positions of the sinks on the N axis (packed or nested: within their sequence),
            ascending, padded with -1 at the end. Sinks inside padding are ignored.
        inter_sink_bias: [B, 1 or Hq, M, M], any floating dtype, any sign; -inf masks that (query, key). Gets a
            gradient. Without it and `sink_positions` this is plain attention.
        sink_logits: [Hq], added to each row's denominator as exp(sink_logits[h]). Gets a gradient.
        causal: query i sees the keys j ≤ i.
        seq_lens: [B] integer. Number of valid tokens per sequence; the padding is on `padding_side`.
        seq_starts: [B] integer, with `seq_lens`: where on the N axis each sequence begins, instead of `padding_side`.
        padding_side: "right", or "left" (valid tokens at the end).
        cu_seqlens: [B + 1] integer, offsets of packed sequences; excludes `seq_lens`.
        dropout_p: probability of dropping an attention weight, in steps of 1/65536 but for the reference.
        scale: multiplies the scores, 1/√D by default.
        return_lse: also return the log-sum-exp of each row.
        max_seqlen: upper bound on the lengths of packed sequences, known on the host. Required for impl="correction"
            on packed input; without it the fused kernel runs.
        impl: None chooses the fastest. "cpu" (C++), on a GPU "triton" (one fused kernel) or "correction" (an unbiased
            attention, corrected at the sinks), or "reference" selects; there is no silent fallback.
            "correction:BACKEND" also selects the unbiased attention: PyTorch's "flash", "cudnn" or "efficient", or
            "flash_attn_2", "flash_attn_3" or "flash_attn_4" where installed. On a CPU the reference computes float64.

    Returns:
        [B, Hq, N, Dv] in q's dtype, packed [T, Hq, Dv], nested [B, Hq, j, Dv]; zero at padding and in rows that see no
        key. With `return_lse` also the log-sum-exp, float32 (float64 for float64 inputs), [B, Hq, N], packed [Hq, T],
        nested [B, Hq, j]; it has no gradient, and is -inf at padding and in rows that see no key.

        Second derivatives (`create_graph=True`) and forward-mode ones (`torch.func.jvp`) run the reference, in its time
        and memory.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; on a CPU also positions, lengths or offsets out
            of order or range (elsewhere `recattn.validate` checks them, or RECATTN_CHECK=1 at every call).
        NotImplementedError: an explicit `impl` that does not support the call; `create_graph=True` after a kernel
            with dropout.
    """
    if autocast_may_be_on():
        check.expect_tensors(q=q, k=k, v=v)
        q, k, v = autocast_inputs(q, k, v)
    if (
        padding_side != "right"
        or type(dropout_p) is not float
        or dropout_p != 0
        or scale is not None
        or max_seqlen is not None
        or (seq_lens is not None and cu_seqlens is not None)
        or seq_starts is not None
    ):
        validate_layout(padding_side, seq_lens, seq_starts, cu_seqlens, max_seqlen)
        check.expect_probability("dropout_p", dropout_p)
        check.expect_numbers(scale=scale)
    tensors = (sink_positions, inter_sink_bias, sink_logits, seq_lens, seq_starts, cu_seqlens)
    if not _fits(q, k, v, *tensors):
        _validate(q, k, v, *tensors)
    if sink_positions is None or inter_sink_bias is None:
        check.expect(inter_sink_bias is None, "sink_positions", "given with inter_sink_bias", None)
        check.expect(sink_positions is None, "inter_sink_bias", "given with sink_positions", None)
        sink_positions, inter_sink_bias = ops.no_sinks(q, cu_seqlens)
    if padding_side == "left":
        seq_starts = window_starts(padding_side, q.shape[2], seq_lens)
    reasons = ops.unsupported_reasons(q.device.type, q, v, padded=seq_lens is not None, dropout_p=dropout_p)
    name, backend = parse_implementation(impl)
    if backend is not None and name == "correction":
        check.expect_choice("BACKEND of impl='correction:BACKEND'", backend, tuple(BACKENDS))
    chosen = select("sink_attention", name, reasons)
    if backend is not None and name != "correction":
        check.expect(False, "impl", "without a backend, but for 'correction'", impl)
    # C++ checks values itself, and uses its own copies.
    if chosen != "cpu" and validation.values_are_checked(q.device):
        sink_positions, seq_lens, seq_starts, cu_seqlens = _checked(q, sink_positions, seq_lens, seq_starts, cu_seqlens)
    if chosen == "reference":
        return reference.sink_attention(
            q,
            k,
            v,
            sink_positions,
            inter_sink_bias,
            sink_logits=sink_logits,
            causal=causal,
            seq_lens=seq_lens,
            seq_starts=seq_starts,
            cu_seqlens=cu_seqlens,
            dropout_p=dropout_p,
            scale=scale,
            return_lse=return_lse,
        )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    options = SinkAttentionOptions(causal, scale, dropout_p, max_seqlen, name, backend)
    tensors = (sink_positions, inter_sink_bias, sink_logits, seq_lens, seq_starts, cu_seqlens)
    seed = draw_dropout_seed(dropout_p, q.device)
    if q is k or k is v or q is v:
        q, k, v = distinct(q, k, v)
    out, lse = apply(ops.SinkAttentionFunction, q, k, v, *tensors, seed, options)
    if not return_lse:
        return out
    return out, lse.t() if cu_seqlens is not None else lse


def _fits(q, k, v, sink_positions, inter_sink_bias, sink_logits, seq_lens, seq_starts, cu_seqlens) -> bool:
    """Whether the tensors are right. False: ask `_validate` what is wrong."""
    sinks = (sink_positions, inter_sink_bias, sink_logits)
    if cu_seqlens is None:
        sizes = _DENSE.sizes(q, k, v, *sinks, seq_lens, seq_starts)
    else:
        sizes = _PACKED.sizes(q, k, v, cu_seqlens, *sinks)
    if sizes is None:
        return False
    if cu_seqlens is None:
        _, Hq, _, D, Hkv, Dv, _ = sizes
    else:
        _, Hq, D, Hkv, Dv, _, _ = sizes
    return D > 0 and Hkv > 0 and Dv > 0 and Hq > 0 and Hq % Hkv == 0


def _checked(
    q: Tensor, sink_positions: Tensor, seq_lens: Tensor | None, seq_starts: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The index tensors with their values checked, where that costs no synchronisation."""
    indices = validation.checked_indices(
        q.device,
        seq_len=q.shape[-2] if cu_seqlens is None else None,
        num_tokens=q.shape[0],
        sink_positions=sink_positions,
        seq_lens=seq_lens,
        seq_starts=seq_starts,
        cu_seqlens=cu_seqlens,
    )
    return indices.sink_positions, indices.seq_lens, indices.seq_starts, indices.cu_seqlens


def _validate(q, k, v, sink_positions, inter_sink_bias, sink_logits, seq_lens, seq_starts, cu_seqlens) -> None:
    sizes: dict[str, int] = {}
    expect_qkv(sizes, q, k, v, cu_seqlens, ("Hq", "Hkv"))
    for size in ("Hq", "Hkv", "D", "Dv"):
        check.expect(sizes[size] > 0, f"{size} of q, k and v", "at least 1", 0)
    heads = (sizes["Hq"], sizes["Hkv"])
    check.expect(heads[0] % heads[1] == 0, "(Hq, Hkv) of q and k", "a multiple and its divisor", heads)
    check.expect_dtype("q", q, check.FLOATING)
    check.expect_same_dtype("q", q, k=k, v=v)
    if sink_positions is not None:
        check.expect_index(sizes, "sink_positions", sink_positions, "B M")
    if inter_sink_bias is not None:
        check.expect_tensors(inter_sink_bias=inter_sink_bias)
        check.expect_shape(sizes, "inter_sink_bias", inter_sink_bias, "B 1|Hq M M")
        check.expect_dtype("inter_sink_bias", inter_sink_bias, check.FLOATING)
    if sink_logits is not None:
        check.expect_tensors(sink_logits=sink_logits)
        check.expect_shape(sizes, "sink_logits", sink_logits, "Hq")
        check.expect_dtype("sink_logits", sink_logits, check.FLOATING)
    expect_windows(sizes, seq_lens, seq_starts)
    check.expect_same_device(
        "q",
        q,
        k=k,
        v=v,
        sink_positions=sink_positions,
        inter_sink_bias=inter_sink_bias,
        sink_logits=sink_logits,
        seq_lens=seq_lens,
        seq_starts=seq_starts,
        cu_seqlens=cu_seqlens,
    )

"""The bias between sink tokens that `sink_attention` takes (CTR-Sink, arXiv 2508.03668)."""

import math

import torch
from torch import Tensor

from recattn import _check as check
from recattn import reference
from recattn._dispatch import select
from recattn._options import InterSinkBiasOptions
from recattn._typing import InterSinkBiasImpl
from recattn.functional._autocast import autocast_inputs, autocast_may_be_on
from recattn.functional._keywords import explain_keywords
from recattn.ops import inter_sink_bias as ops
from recattn.ops._library import apply, distinct
from recattn.ops._support import draw_dropout_seed

# The usual tensors; what does not fit is checked by `_validate`, which says why.
_TENSORS = check.Layouts(
    q_s=(check.FLOATING, "B H M D"),
    k_s=(check.SAME, "B H M D"),
    sink_mask=(check.BOOL, "B M?"),
    bias_scale=(check.FLOATING, "[1]?"),
)


@explain_keywords
def inter_sink_bias(
    q_s: Tensor,
    k_s: Tensor,
    *,
    sink_mask: Tensor | None = None,
    bias_scale: float | Tensor = 1.0,
    causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    impl: InterSinkBiasImpl | None = None,
) -> Tensor:
    """The bias of `sink_attention`, computed by attention among the sinks of a sequence:

        B[b, i, j] = bias_scale · (1/H) Σ_h dropout(softmax_j(scale · q_s[b, h, i] · k_s[b, h, j]))

    over the sinks j that sink i sees. The formula is that of CTR-Sink's official code (arXiv 2508.03668), where q_s and
    k_s are projections, with bias, of the layer-normed hidden states at the sinks. That code has no mask: its padded
    sinks take part in the softmax, so that results depend on the rest of the batch, and its sinks see later ones.

    Args:
        q_s, k_s: [B, H, M, D], float64, float32, bfloat16 or float16, the same dtype; autocast casts them.
        sink_mask: [B, M] bool, True at valid sinks (`sink_positions >= 0`, and inside the sequence). The others may
            hold anything: no sink sees them, and their rows and columns of the bias are zero.
        bias_scale: a number, or a tensor of one element and any floating dtype, which gets a gradient. The official
            code learns it, from 1 in decoder models and from 10 in BERT.
        causal: sink i sees the sinks j ≤ i.
        dropout_p: probability of dropping an attention weight.
        scale: multiplies the scores, 1/√D by default.
        impl: None chooses the fastest. "triton" (on CUDA devices, M ≤ 128), "cpu" (C++) or "reference" selects; there
            is no silent fallback.

    Returns:
        [B, 1, M, M], float32 (float64 for float64 inputs): one bias for all heads of the attention.

        Second derivatives (`create_graph=True`) and forward-mode ones (`torch.func.jvp`) run the reference, in its time
        and memory.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit.
        NotImplementedError: an explicit `impl` that does not support the call; `create_graph=True` after a kernel
            with dropout.
    """
    if not _fits(q_s, k_s, sink_mask, bias_scale) or autocast_may_be_on():
        _validate(q_s, k_s, sink_mask, bias_scale)
        q_s, k_s = autocast_inputs(q_s, k_s)
        check.expect_same_dtype("q_s", q_s, k_s=k_s)
    check.expect_probability("dropout_p", dropout_p)
    check.expect_numbers(scale=scale)
    if isinstance(bias_scale, Tensor):
        bias_scale = bias_scale.reshape(())
    chosen = select("inter_sink_bias", impl, ops.unsupported_reasons(q_s.device.type, q_s))
    if chosen == "reference":
        return reference.inter_sink_bias(
            q_s, k_s, sink_mask=sink_mask, bias_scale=bias_scale, causal=causal, dropout_p=dropout_p, scale=scale
        )
    factor, learned_scale = (1.0, bias_scale) if isinstance(bias_scale, Tensor) else (float(bias_scale), None)
    seed = draw_dropout_seed(dropout_p, q_s.device)
    options = InterSinkBiasOptions(factor, causal, dropout_p, scale, chosen)
    return apply(ops.InterSinkBiasFunction, *distinct(q_s, k_s), sink_mask, learned_scale, seed, options)


def _fits(q_s, k_s, sink_mask, bias_scale) -> bool:
    """Whether the tensors and bias_scale are right. False: ask `_validate` what is wrong."""
    is_number = type(bias_scale) in (float, int) and -math.inf < bias_scale < math.inf
    if bias_scale is None:
        return False
    sizes = _TENSORS.sizes(q_s, k_s, sink_mask, None if is_number else bias_scale)
    return sizes is not None and sizes[1] > 0 and sizes[3] > 0


def _validate(q_s, k_s, sink_mask, bias_scale):
    check.expect_tensors(q_s=q_s, k_s=k_s)
    sizes: dict[str, int] = {}
    check.expect_shape(sizes, "q_s", q_s, "B H M D")
    check.expect_shape(sizes, "k_s", k_s, "B H M D")
    for size in ("H", "D"):
        check.expect(sizes[size] > 0, f"{size} of q_s and k_s", "at least 1", 0)
    check.expect_dtype("q_s", q_s, check.FLOATING)
    check.expect_dtype("k_s", k_s, check.FLOATING)
    check.expect_same_device("q_s", q_s, k_s=k_s)
    if sink_mask is not None:
        expect_sink_mask(sizes, sink_mask, "q_s", q_s)
    one_number = "a number or a tensor of one element"
    if isinstance(bias_scale, Tensor):
        check.expect(bias_scale.numel() == 1, "bias_scale", one_number, f"one of shape {list(bias_scale.shape)}")
        check.expect_dtype("bias_scale", bias_scale, check.FLOATING)
        check.expect_same_device("q_s", q_s, bias_scale=bias_scale)
    else:
        check.expect(isinstance(bias_scale, int | float), "bias_scale", one_number, type(bias_scale).__name__)
        check.expect_numbers(bias_scale=bias_scale)


def expect_sink_mask(sizes: dict[str, int], sink_mask: Tensor, like_name: str, like: Tensor) -> None:
    check.expect_tensors(sink_mask=sink_mask)
    check.expect_shape(sizes, "sink_mask", sink_mask, "B M")
    check.expect_dtype("sink_mask", sink_mask, (torch.bool,))
    check.expect_same_device(like_name, like, sink_mask=sink_mask)

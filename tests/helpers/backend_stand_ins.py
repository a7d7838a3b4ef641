"""Stand-ins for PyTorch's attention operators and Dao's packages: their signatures and layouts, computed in float64."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from recattn.ops._support import token_major

# --- One sequence, tokens first, in float64 ---


def scores_of(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """[Hq, N, N]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = scale * torch.einsum("ihd,jhd->hij", q.double(), k.double())
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf) if causal else scores


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """out [N, Hq, Dv], lse [Hq, N]."""
    scores = scores_of(q, k, causal, scale)
    v = v.double().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v), scores.logsumexp(-1)


def attend_backward(dout, q, k, v, out, lse, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv from the given out and lse."""
    groups = q.shape[1] // k.shape[1]
    dout, out = dout.double(), out.double()
    weights = (scores_of(q, k, causal, scale) - lse.double()[..., None]).exp()  # [Hq, N, N]
    dweights = torch.einsum("ihd,jhd->hij", dout, v.double().repeat_interleave(groups, dim=1))
    dscore = weights * (dweights - (dout * out).sum(-1).T[..., None]) * scale
    dq = torch.einsum("hij,jhd->ihd", dscore, k.double().repeat_interleave(groups, dim=1))
    dk, dv = torch.einsum("hij,ihd->jhd", dscore, q.double()), torch.einsum("hij,ihd->jhd", weights, dout)
    return dq, *(x.unflatten(1, (k.shape[1], groups)).sum(2) for x in (dk, dv))


# --- The same over a batch, as FlashAttention lays it out ---


def sequences(cu_seqlens: Tensor | None, batch: int) -> list:
    """Where each sequence lies in [B, N, H, D], or packed in [T, H, D]."""
    if cu_seqlens is None:
        return list(range(batch))
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous()
    return [slice(start, stop) for start, stop in pairwise(cu_seqlens.tolist())]


def lse_at(lse: Tensor, sequence: int | slice) -> Tensor:
    return lse[sequence] if isinstance(sequence, int) else lse[:, sequence]


def run_forward(q, k, v, cu_seqlens, max_seqlen, causal, scale, out=None) -> tuple[Tensor, Tensor]:
    expect_loadable(q, k, v)
    out = q.new_empty(*q.shape[:-1], v.shape[-1]) if out is None else out
    lse = q.new_empty(
        (q.shape[0], q.shape[2], q.shape[1]) if cu_seqlens is None else (q.shape[1], q.shape[0]), dtype=torch.float32
    )
    for s in sequences(cu_seqlens, q.shape[0]):
        assert q[s].shape[0] <= max_seqlen
        out[s], lse_at(lse, s)[:] = attend(q[s], k[s], v[s], causal, scale)
    return out, lse


def run_backward(dout, q, k, v, out, lse, cu_seqlens, max_seqlen, causal, scale, grads=None):
    expect_loadable(dout, q, k, v, out)
    assert lse.dtype == torch.float32 and lse.is_contiguous()
    grads = [torch.empty_like(x) for x in (q, k, v)] if grads is None else grads
    for s in sequences(cu_seqlens, q.shape[0]):
        assert q[s].shape[0] <= max_seqlen
        tensors = (dout[s], q[s], k[s], v[s], out[s], lse_at(lse, s))
        for grad, values in zip(grads, attend_backward(*tensors, causal, scale), strict=True):
            grad[s] = values
    return grads


def expect_loadable(*tensors: Tensor) -> None:
    for x in tensors:
        assert x.stride(-1) == 1 and x.data_ptr() % 16 == 0
        assert all(step > 0 and step * x.element_size() % 16 == 0 for step in x.stride()[:-1])


# --- Stand-ins for PyTorch's operators ---


def aten_flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, causal, return_mask, *, scale, **_):
    assert cu_q is cu_k is None or cu_q.equal(cu_k)
    assert (max_q, dropout_p, return_mask) == (max_k, 0.0, False)
    out, lse = run_forward(q, k, v, cu_q, max_q, causal, scale, torch.empty_like(q))
    return out, lse, q.new_empty(2), q.new_empty(0), q.new_empty(0)


def aten_flash_backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, causal, _seed, _, *, scale, **__):
    assert (max_q, dropout_p) == (max_k, 0.0)
    return tuple(run_backward(dout, q, k, v, out, lse, cu_q, max_q, causal, scale))


def aten_cudnn_forward(q, k, v, bias, with_lse, dropout_p=0.0, causal=False, return_mask=False, *, scale=None):
    assert (bias, with_lse, dropout_p, return_mask) == (None, True, 0.0, False)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    width, length = v.shape[-1], q.shape[1]
    like_q = q.transpose(1, 2).new_empty if q.transpose(1, 2).is_contiguous() else None
    out = like_q(q.shape[0], q.shape[2], length, width).transpose(1, 2) if like_q else None
    out, lse = run_forward(q, k, v, None, length, causal, scale, out)
    nothing = q.new_empty(0)
    return out.transpose(1, 2), lse[..., None], nothing, nothing, length, length, nothing, nothing, nothing


def aten_cudnn_backward(
    dout, q, k, v, out, lse, _seed, _offset, bias, cu_q, cu_k, max_q, max_k, dropout_p, causal, *, scale=None
):
    assert (bias, cu_q, cu_k, max_q, max_k, dropout_p) == (None, None, None, q.shape[2], q.shape[2], 0.0)
    # Nobody else's plan has this key, and in it the layouts of out and dout are a function of q's.
    assert math.copysign(1, dropout_p) == -1
    assert lse.shape == (*q.shape[:3], 1) and lse.is_contiguous()
    like_q = q.new_empty(*q.shape[:3], v.shape[-1])
    assert out.stride() == dout.stride() == (like_q if q.is_contiguous() else token_major(like_q)).stride()
    tensors = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    return tuple(x.transpose(1, 2) for x in run_backward(*tensors, lse[..., 0], None, max_q, causal, scale))


def aten_efficient_forward(
    q, k, v, bias, cu_q, cu_k, max_q, max_k, dropout_p, mask_type, with_lse=False, *, scale, **_
):
    assert (bias, dropout_p, with_lse) == (None, 0.0, True) and q.shape[2] == k.shape[2] == v.shape[2]
    packed = cu_q is not None
    q, k, v = (x.squeeze(0) if packed else x for x in (q, k, v))
    out, lse = run_forward(q, k, v, cu_q, max_q, bool(mask_type), scale)
    rows = [lse_at(lse, s) for s in sequences(cu_q, q.shape[0])]
    padded = q.new_full((len(rows), q.shape[-2], math.ceil(max_q / 32) * 32), math.nan, dtype=torch.float32)
    for i, row in enumerate(rows):
        padded[i, :, : row.shape[1]] = row
    return out.unsqueeze(0) if packed else out, padded, q.new_empty(0), q.new_empty(0), max_q, max_k


def aten_efficient_backward(
    dout, q, k, v, bias, out, cu_q, _cu_k, max_q, _max_k, lse, dropout_p, _seed, _offset, mask_type, with_bias, *, scale
):
    assert (bias, dropout_p, with_bias) == (None, 0.0, False)
    assert out.is_contiguous() and lse.is_contiguous() and lse.shape[-1] == math.ceil(max_q / 32) * 32
    assert max_q <= q.shape[1]
    packed = cu_q is not None
    shape = q.shape[:2]
    dout, q, k, v, out = (x.squeeze(0) if packed else x for x in (dout, q, k, v, out))
    rows = sequences(cu_q, q.shape[0])
    plain = lse.new_empty((shape[0], q.shape[2], shape[1]) if not packed else (q.shape[1], shape[1]))
    for padded, s in zip(lse, rows, strict=True):
        length = q[s].shape[0]
        lse_at(plain, s)[:] = padded[:, :length]
        assert (padded[:, length:] == math.inf).all()
    grads = run_backward(dout, q, k, v, out, plain, cu_q, max_q, bool(mask_type), scale)
    return *(x.unsqueeze(0) if packed else x for x in grads), q.new_empty(0)


ATEN = {
    "_flash_attention_forward": aten_flash_forward,
    "_flash_attention_backward": aten_flash_backward,
    "_scaled_dot_product_cudnn_attention": aten_cudnn_forward,
    "_scaled_dot_product_cudnn_attention_backward": aten_cudnn_backward,
    "_efficient_attention_forward": aten_efficient_forward,
    "_efficient_attention_backward": aten_efficient_backward,
}


# --- Stand-ins for Dao's packages, with their signatures ---


@torch.library.custom_op("recattn_test::_flash_attn_forward", mutates_args=())
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert (dropout_p, window_size_left, window_size_right, softcap, return_softmax) == (0.0, -1, -1, 0.0, False)
    out, lse = run_forward(q, k, v, None, q.shape[1], causal, softmax_scale, torch.empty_like(q))
    return out, lse, q.new_empty(0), q.new_empty(2)


@torch.library.custom_op("recattn_test::_flash_attn_varlen_forward", mutates_args=())
def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert (dropout_p, window_size_left, window_size_right, softcap, return_softmax) == (0.0, -1, -1, 0.0, False)
    assert cu_seqlens_q.equal(cu_seqlens_k) and max_seqlen_q == max_seqlen_k > 1
    out, lse = run_forward(q, k, v, cu_seqlens_q, max_seqlen_q, causal, softmax_scale)
    return out, lse, q.new_empty(0), q.new_empty(2)


@torch.library.custom_op("recattn_test::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
    seen["deterministic"] = deterministic
    run_backward(dout, q, k, v, out, softmax_lse, None, q.shape[1], causal, softmax_scale, (dq, dk, dv))
    return q.new_empty(0)


@torch.library.custom_op("recattn_test::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
    seen["deterministic"] = deterministic
    tensors = (dout, q, k, v, out, softmax_lse, cu_seqlens_q, max_seqlen_q)
    run_backward(*tensors, causal, softmax_scale, (dq, dk, dv))
    return q.new_empty(0)


FLASH_ATTN_2 = (_flash_attn_forward, _flash_attn_varlen_forward, _flash_attn_backward, _flash_attn_varlen_backward)
seen: dict[str, object] = {}  # arguments that do not show in the result

FLASH_ATTN_3_FWD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None, Tensor(v_new!)? v_new = None, Tensor? q_v = None, "
    "Tensor(out!)? out = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, "
    "Tensor? cu_seqlens_k_new = None, Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, "
    "int? max_seqlen_k = None, Tensor? page_table = None, Tensor? kv_batch_idx = None, Tensor? leftpad_k = None, "
    "Tensor? rotary_cos = None, Tensor? rotary_sin = None, Tensor? seqlens_rotary = None, Tensor? q_descale = None, "
    "Tensor? k_descale = None, Tensor? v_descale = None, float? softmax_scale = None, bool is_causal = False, "
    "int window_size_left = -1, int window_size_right = -1, int attention_chunk = 0, float softcap = 0.0, "
    "bool is_rotary_interleaved = False, Tensor? scheduler_metadata = None, int num_splits = 0, "
    "bool? pack_gqa = None, int sm_margin = 0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
)
FLASH_ATTN_3_BWD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq = None, "
    "Tensor(dk!)? dk = None, Tensor(dv!)? dv = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, "
    "Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, int? max_seqlen_k = None, "
    "float? softmax_scale = None, bool is_causal = False, int window_size_left = -1, int window_size_right = -1, "
    "float softcap = 0.0, bool deterministic = False, int sm_margin = 0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def flash_attn_3_fwd(*arguments):
    passed = by_name(torch.ops.flash_attn_3.fwd.default, arguments)
    lengths = (passed["cu_seqlens_q"], passed["max_seqlen_q"])
    assert lengths == (passed["cu_seqlens_k"], passed["max_seqlen_k"]) and passed["num_splits"] == 1
    tensors = (passed["q"], passed["k"], passed["v"], *lengths)
    out, lse = run_forward(*tensors, passed["is_causal"], passed["softmax_scale"], passed["out"])
    return out, lse, lse.new_empty(0), lse.new_empty(0)


def flash_attn_3_bwd(*arguments):
    passed = by_name(torch.ops.flash_attn_3.bwd.default, arguments)
    lengths = (passed["cu_seqlens_q"], passed["max_seqlen_q"])
    assert lengths == (passed["cu_seqlens_k"], passed["max_seqlen_k"])
    seen["deterministic"] = passed["deterministic"]
    tensors = [passed[name] for name in ("dout", "q", "k", "v", "out", "softmax_lse")]
    grads = [passed[name] for name in ("dq", "dk", "dv")]
    run_backward(*tensors, *lengths, passed["is_causal"], passed["softmax_scale"], grads)
    return tuple(tensors[0].new_empty(0) for _ in range(5))


def by_name(operator, arguments: tuple) -> dict[str, object]:
    """What an operator was called with; a kernel in Python is not passed the defaults at the end."""
    schema = operator._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema}
    return defaults | dict(zip(defaults, arguments, strict=False))


def _flash_attn_fwd(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    softmax_scale=None,
    causal=False,
    num_splits=1,
    return_lse=False,
    out=None,
    lse=None,
):
    assert return_lse and max_seqlen_q == max_seqlen_k
    return *run_forward(q, k, v, cu_seqlens_q, max_seqlen_q, causal, softmax_scale, out), None, None


def _flash_attn_bwd(
    q,
    k,
    v,
    out,
    dout,
    lse,
    softmax_scale=None,
    causal=False,
    softcap=0.0,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    deterministic=False,
    dlse=None,
    learnable_sink=None,
):
    seen["deterministic"] = deterministic
    return tuple(run_backward(dout, q, k, v, out, lse, cu_seqlens_q, max_seqlen_q, causal, softmax_scale))

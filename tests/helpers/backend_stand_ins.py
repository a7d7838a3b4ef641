"""Stand-ins for PyTorch's attention operators and Dao's packages: their signatures and layouts, computed in float64."""

import inspect
import math
from collections.abc import Callable
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
    """dq, dk, dv from a given out and lse."""
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
    """Where each sequence lies: its index in [B, N, H, D], or its slice of packed [T, H, D]."""
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


def aten_flash_backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, causal, *_, scale, **__):
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


def aten_cudnn_backward(dout, q, k, v, out, lse, _seed, _offset, *others, scale=None):
    bias, cu_q, cu_k, max_q, max_k, dropout_p, causal = others
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


def aten_efficient_backward(dout, q, k, v, bias, out, cu_q, _cu_k, max_q, _max_k, lse, *others, scale):
    dropout_p, _seed, _offset, mask_type, with_bias = others
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


def flash_attn_2(name: str, arguments: str, returns: str, mutates: tuple[str, ...] = ()) -> Callable:
    """A decorator: flash_attn 2's operator of that schema, whose stand-in takes its arguments as one dict by name."""

    def decorate(stand_in: Callable) -> Callable:
        def called(*passed):
            return stand_in(by_name(operator._opoverload, passed))

        schema = f"({' '.join(arguments.split())}) -> {returns}"
        operator = torch.library.custom_op(f"recattn_test::{name}", called, mutates_args=mutates, schema=schema)
        return operator

    return decorate


OUT_AND_LSE = "(Tensor, Tensor, Tensor, Tensor)"
GRADIENTS = ("dq", "dk", "dv")
SAVED = """Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,
    Tensor(dq!)? dq, Tensor(dk!)? dk, Tensor(dv!)? dv,"""
LENGTHS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,"
OPTIONS = """float dropout_p, float softmax_scale, bool causal,
    SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes,"""


def expect_plain_attention(passed: dict[str, object]) -> None:
    names = ("dropout_p", "window_size_left", "window_size_right", "softcap", "alibi_slopes")
    assert [passed[name] for name in names] == [0.0, -1, -1, 0.0, None]


@flash_attn_2("_flash_attn_forward", f"Tensor q, Tensor k, Tensor v, {OPTIONS} bool return_softmax", OUT_AND_LSE)
def _flash_attn_forward(passed):
    expect_plain_attention(passed)
    assert passed["return_softmax"] is False
    q, k, v = (passed[name] for name in "qkv")
    out = torch.empty_like(q)
    out, lse = run_forward(q, k, v, None, q.shape[1], passed["causal"], passed["softmax_scale"], out)
    return out, lse, q.new_empty(0), q.new_empty(2)


@flash_attn_2(
    "_flash_attn_varlen_forward",
    f"""Tensor q, Tensor k, Tensor v, {LENGTHS} float dropout_p, float softmax_scale, bool causal,
    SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0., Tensor? alibi_slopes=None,
    bool return_softmax=False, Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None,
    bool zero_tensors=False""",
    OUT_AND_LSE,
)
def _flash_attn_varlen_forward(passed):
    expect_plain_attention(passed)
    assert passed["return_softmax"] is False
    assert passed["cu_seqlens_q"].equal(passed["cu_seqlens_k"]) and passed["max_seqlen_q"] == passed["max_seqlen_k"] > 1
    q, k, v, *options = (passed[name] for name in ("q", "k", "v", "cu_seqlens_q", "max_seqlen_q", "causal"))
    out, lse = run_forward(q, k, v, *options, passed["softmax_scale"])
    return out, lse, q.new_empty(0), q.new_empty(2)


@flash_attn_2(
    "_flash_attn_backward",
    f"{SAVED} {OPTIONS} bool deterministic, Tensor? rng_state=None",
    "Tensor",
    GRADIENTS,
)
def _flash_attn_backward(passed):
    return flash_attn_2_backward(passed, None, passed["q"].shape[1])


@flash_attn_2(
    "_flash_attn_varlen_backward",
    f"{SAVED} {LENGTHS} {OPTIONS} bool deterministic, Tensor? rng_state=None, bool zero_tensors=False",
    "Tensor",
    GRADIENTS,
)
def _flash_attn_varlen_backward(passed):
    return flash_attn_2_backward(passed, passed["cu_seqlens_q"], passed["max_seqlen_q"])


def flash_attn_2_backward(passed: dict[str, object], cu_seqlens: Tensor | None, max_seqlen: int) -> Tensor:
    expect_plain_attention(passed)
    seen["deterministic"] = passed["deterministic"]
    saved = (passed[name] for name in ("dout", "q", "k", "v", "out", "softmax_lse"))
    gradients = [passed[name] for name in GRADIENTS]
    run_backward(*saved, cu_seqlens, max_seqlen, passed["causal"], passed["softmax_scale"], gradients)
    return passed["q"].new_empty(0)


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
    """The arguments of an operator by name. PyTorch leaves out trailing defaults when it calls a Python kernel."""
    schema = operator._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema}
    return defaults | dict(zip(defaults, arguments, strict=False))


def flash_attn_4(required: str, **optional: object) -> Callable:
    """A decorator: a function of these parameters, whose stand-in takes its arguments as one dict by name."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in required.split()]
    parameters += [inspect.Parameter(name, kind, default=value) for name, value in optional.items()]
    signature = inspect.Signature(parameters)

    def decorate(stand_in: Callable) -> Callable:
        def called(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return stand_in(bound.arguments)

        called.__signature__ = signature
        return called

    return decorate


LENGTHS_4 = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k"))


@flash_attn_4(
    "q k v",
    qv=None,
    **LENGTHS_4,
    **{"softmax_scale": None, "causal": False, "num_splits": 1, "return_lse": False, "out": None, "lse": None},
)
def _flash_attn_fwd(passed):
    assert passed["return_lse"] and passed["max_seqlen_q"] == passed["max_seqlen_k"]
    names = ("q", "k", "v", "cu_seqlens_q", "max_seqlen_q", "causal", "softmax_scale", "out")
    return *run_forward(*(passed[name] for name in names)), None, None


@flash_attn_4(
    "q k v out dout lse",
    softmax_scale=None,
    causal=False,
    softcap=0.0,
    **LENGTHS_4,
    deterministic=False,
    dlse=None,
    learnable_sink=None,
)
def _flash_attn_bwd(passed):
    seen["deterministic"] = passed["deterministic"]
    names = ("dout", "q", "k", "v", "out", "lse", "cu_seqlens_q", "max_seqlen_q", "causal", "softmax_scale")
    return tuple(run_backward(*(passed[name] for name in names)))

"""The attentions that the correction path corrects: their arguments, layouts and limits, and on a GPU their numbers.

Without a GPU every adapter runs over a stand-in that has the signature and the layouts of what it calls, computes in
float64, and checks what that takes for granted. PyTorch's operators keep their own schemas, and on the meta device
their own shapes.
"""

import math
import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import Tensor

from recattn import reference
from recattn.ops import backends
from recattn.ops._support import token_major
from recattn.ops.backends import BACKENDS, AttentionBackend, Call, empty_backward, empty_forward, register
from recattn.ops.backends.aten import _pack_lse, _unpack_lse
from recattn.ops.backends.flash_attn import package_unsupported_reason
from recattn.testing import assert_matches_reference

PACKAGES = ("flash_attn_2", "flash_attn_3", "flash_attn_4")
IN_TORCH = ("flash", "cudnn", "efficient")


def call(**changes) -> Call:
    """A call that every backend takes, on a Hopper, but for the changes."""
    simple = Call(
        dtype=torch.float16,
        capability=(9, 0),
        head_dim=64,
        value_dim=64,
        q_heads=4,
        kv_heads=4,
        batch=8,
        max_seqlen=100,
        packed=False,
        scale=0.125,
        deterministic=False,
    )
    return simple._replace(**changes)


def supporting(call: Call) -> list[AttentionBackend]:
    return [backend for backend in backends.BACKENDS.values() if backend.unsupported_reason(call) is None]


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


def test_the_stand_in_is_the_attention():
    q, k, v, dout = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 6), torch.randn(9, 4, 6)
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    out, lse = attend(q, k, v, True, 0.3)
    expected = torch.autograd.grad(out, (q, k, v), dout.double())
    for got, want in zip(attend_backward(dout, q, k, v, out, lse, True, 0.3), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


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


def install(monkeypatch, name: str, **contents) -> None:
    """Put a module of that name, and its parents, where `import` finds them."""
    *parents, last = name.split(".")
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    if parents:
        parent = ".".join(parents)
        if parent not in sys.modules:
            install(monkeypatch, parent)
        monkeypatch.setattr(sys.modules[parent], last, module, raising=False)


@pytest.fixture
def packages(monkeypatch):
    """Dao's packages, as far as the adapters can tell."""
    package_unsupported_reason.cache_clear()
    install(monkeypatch, "flash_attn.flash_attn_interface", **{f._opoverload._opname: f for f in FLASH_ATTN_2})
    install(monkeypatch, "flash_attn.cute.interface", _flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)
    install(monkeypatch, "flash_attn_3._C")
    yield
    package_unsupported_reason.cache_clear()


@pytest.fixture(scope="module")
def operators():
    """PyTorch's operators and FlashAttention 3's, on the CPU."""
    with (
        torch.library._scoped_library("aten", "IMPL") as aten,
        torch.library._scoped_library("flash_attn_3", "DEF") as fa3,
    ):
        for name, kernel in ATEN.items():
            aten.impl(name, kernel, "CPU")
        fa3.define(FLASH_ATTN_3_FWD)
        fa3.define(FLASH_ATTN_3_BWD)
        fa3.impl("fwd", flash_attn_3_fwd, "CPU")
        fa3.impl("bwd", flash_attn_3_bwd, "CPU")
        yield


@pytest.fixture
def cudnn(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)


# --- What a backend is for: an attention whose output and lse were corrected ---


class Corrected(torch.autograd.Function):
    """The backend's attention, corrected in place by a logit in each head's softmax, without the rows left out.

    Returns (out, lse).
    """

    @staticmethod
    def forward(ctx, q, k, v, backend, options, sink_logits, left_out):
        out, lse = backend.forward(q, k, v, **options)
        if sink_logits is not None:
            total = torch.logaddexp(lse, sink_logits[:, None] if lse.dim() == 3 else sink_logits)
            out *= (lse - total).exp().unsqueeze(-1)
            lse.copy_(total)
        returned = out.clone(), lse.clone()
        if left_out is not None:
            returned[0].masked_fill_(left_out.unsqueeze(-1), 0)
            lse.masked_fill_(left_out, math.inf)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.backend, ctx.options = backend, options
        ctx.mark_non_differentiable(returned[1])
        return returned

    @staticmethod
    def backward(ctx, dout, _dlse):
        return *ctx.backend.backward(dout, *ctx.saved_tensors, **ctx.options), None, None, None, None


def plain(q, k, v, *, causal, scale, cu_seqlens=None, max_seqlen=None, sink_logits=None, left_out=None, swap=False):
    """The same in plain PyTorch: recattn's reference without sinks."""
    batch = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    nowhere = torch.zeros(batch, 0, dtype=torch.int64, device=q.device)
    options = {"causal": causal, "scale": scale, "cu_seqlens": cu_seqlens, "sink_logits": sink_logits}
    out, lse = reference.sink_attention(q, k, v, nowhere, q.new_zeros(batch, 1, 0, 0), **options, return_lse=True)
    out = out if left_out is None else out.masked_fill(left_out.unsqueeze(-1), 0)
    return out.transpose(1, 2) if swap else out, lse if cu_seqlens is None else lse.t()


def check(backend: AttentionBackend, q, k, v, *, sink_logits=None, left_out=None, swap=False, **options) -> None:
    """out, lse, dq, dk and dv within the bound, and laid out as promised. With `swap`, dout comes token by token."""

    def kernel(q, k, v):
        out, lse = Corrected.apply(q, k, v, backend, options, sink_logits, left_out)
        return out.transpose(1, 2) if swap else out, lse

    def expected(q, k, v):
        return plain(q, k, v, **options, sink_logits=sink_logits, left_out=left_out, swap=swap)

    assert_matches_reference(kernel, expected, {"q": q, "k": k, "v": v}, grads=("q", "k", "v"))
    out, lse = backend.forward(q, k, v, **options)
    grads = backend.backward(torch.randn_like(out), q, k, v, out, lse, **options)
    for got, want in zip((out, lse, *grads), (*empty_forward(q, v), *empty_backward(q, k, v)), strict=True):
        expect_same_layout(got, want)


def expect_same_layout(got: Tensor, want: Tensor) -> None:
    assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
    assert all(a == b for size, a, b in zip(got.shape, got.stride(), want.stride(), strict=True) if size > 1)


def draw(layout: str, lengths, heads=(4, 4), dims=(64, 64), dtype=torch.float32, device="cpu"):
    """q, k, v and the options that say where the sequences are. Dense, `lengths` is (B, N)."""
    (q_heads, kv_heads), (dim, value_dim) = heads, dims
    if layout == "packed":
        cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0)
        tokens, options = (sum(lengths),), {"cu_seqlens": cu_seqlens, "max_seqlen": max(lengths)}
    else:
        tokens, options = lengths, {}
    shapes = ((*tokens, q_heads, dim), (*tokens, kv_heads, dim), (*tokens, kv_heads, value_dim))
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    if layout == "sliced":  # from one projection
        q, k, v = torch.cat([q, k, v], dim=2).split([q_heads, kv_heads, kv_heads], dim=2)
    if layout == "misaligned":
        q, k, v = (x.new_empty(*tokens, x.shape[2], dim + 1).normal_()[..., 1:] for x in (q, k, v))
    if layout != "packed":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if layout == "heads first":
        q, k, v = (x.contiguous() for x in (q, k, v))
    return (q, k, v), options


def grouped(name: str) -> tuple[int, int]:
    return (4, 4) if name == "efficient" else (4, 2)


# --- Through the stand-ins ---


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["heads first", "tokens first", "sliced", "misaligned"])
@pytest.mark.parametrize("name", BACKENDS)
def test_dense(name, layout, causal, operators, packages):
    for length in (1, 33, 64):
        if name == "cudnn" and length == 1:
            continue
        tensors, _ = draw(layout, (2, length), grouped(name), dims=(16, 16))
        for swap in (False, True):
            check(BACKENDS[name], *tensors, causal=causal, scale=0.3, swap=swap)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "cudnn"])
def test_packed(name, causal, operators, packages):
    for lengths in [(5, 0, 33, 1, 0), (1, 0), (0, 0, 1)]:
        tensors, options = draw("packed", lengths, grouped(name), dims=(16, 16))
        check(BACKENDS[name], *tensors, causal=causal, scale=0.3, **options)
        longer = {**options, "max_seqlen": 1000, "cu_seqlens": options["cu_seqlens"].int()}
        check(BACKENDS[name], *tensors, causal=causal, scale=0.3, **longer)


@pytest.mark.parametrize("layout", ["tokens first", "packed"])
@pytest.mark.parametrize("name", BACKENDS)
def test_corrected(name, layout, operators, packages):
    if (name, layout) == ("cudnn", "packed"):
        pytest.skip("it takes dense batches only")
    tensors, options = draw(layout, (5, 0, 33, 9) if layout == "packed" else (2, 33), grouped(name), dims=(16, 16))
    rows = tensors[0].shape[:-1]
    left_out = torch.rand(rows) < 0.2
    check(BACKENDS[name], *tensors, **options, causal=True, scale=0.3, sink_logits=torch.randn(4), left_out=left_out)


@pytest.mark.parametrize("name", ["cudnn", "efficient"])
def test_other_value_dim(name, operators):
    for layout in ("heads first", "tokens first"):
        tensors, _ = draw(layout, (2, 33), dims=(16, 24))
        check(BACKENDS[name], *tensors, causal=False, scale=0.3)


@pytest.mark.parametrize("name", PACKAGES)
def test_determinism_is_asked_for(name, operators, packages):
    tensors, options = draw("tokens first", (1, 9), dims=(16, 16))
    options |= {"causal": True, "scale": 0.3}
    for strict in (False, True):
        torch.use_deterministic_algorithms(True, warn_only=not strict)
        out, lse = BACKENDS[name].forward(*tensors, **options)
        BACKENDS[name].backward(out, *tensors, out, lse, **options)
        assert seen.pop("deterministic") is strict


# --- PyTorch's own shapes ---


@pytest.mark.parametrize("layout", ["heads first", "tokens first", "sliced", "packed"])
@pytest.mark.parametrize("name", IN_TORCH)
def test_torch_takes_the_arguments(name, layout):
    if (name, layout) == ("cudnn", "packed"):
        pytest.skip("it takes dense batches only")
    backend, lengths = BACKENDS[name], (5, 0, 100, 1) if layout == "packed" else (2, 100)
    (q, k, v), options = draw(layout, lengths, grouped(name), dtype=torch.bfloat16, device="meta")
    options |= {"causal": True, "scale": 0.3}
    results = out, lse = backend.forward(q, k, v, **options)
    promised = empty_forward(q, v)
    if name != "efficient":  # PyTorch's meta kernel of that backward forgets an argument
        results += backend.backward(out, q, k, v, out, lse, **options)
        promised += empty_backward(q, k, v)
    for got, want in zip(results, promised, strict=True):
        expect_same_layout(got, want)


# --- lse of the memory-efficient attention ---


def test_lse_of_packed_sequences():
    lengths = (5, 0, 33, 1, 0)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    lse = torch.randn(3, sum(lengths))
    padded = _unpack_lse(lse, cu_seqlens, 64)
    assert padded.shape == (5, 3, 64) and padded.is_contiguous()
    for row, (start, stop) in zip(padded, pairwise(cu_seqlens.tolist()), strict=True):
        assert row[:, : stop - start].equal(lse[:, start:stop])
        assert (row[:, stop - start :] == math.inf).all()
    padded[padded == math.inf] = math.nan  # padding is not read
    assert _pack_lse(padded, cu_seqlens, sum(lengths)).equal(lse)


# --- Limits ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_simple_call_is_taken(dtype, operators, packages, cudnn):
    assert [backend.name for backend in supporting(call(dtype=dtype))] == list(BACKENDS)
    packed = call(dtype=dtype, packed=True)
    assert [backend.name for backend in supporting(packed)] == [name for name in BACKENDS if name != "cudnn"]


@pytest.mark.parametrize(
    "changes, takers",
    [
        ({"dtype": torch.float32}, ["efficient"]),
        ({"dtype": torch.float64}, []),
        ({"capability": (7, 5)}, ["efficient"]),
        ({"capability": (7, 5), "dtype": torch.bfloat16}, []),
        ({"capability": (8, 0)}, ["cudnn", "flash", "flash_attn_2", "efficient"]),
        ({"capability": (10, 0)}, ["flash_attn_4", "cudnn", "flash", "flash_attn_2", "efficient"]),
        ({"head_dim": 60, "value_dim": 60}, []),
        ({"head_dim": 60, "value_dim": 60, "dtype": torch.float32}, ["efficient"]),
        ({"head_dim": 256, "value_dim": 256}, ["flash_attn_3", "cudnn", "flash", "flash_attn_2", "efficient"]),
        ({"head_dim": 256, "value_dim": 256, "capability": (8, 0)}, ["flash", "flash_attn_2", "efficient"]),
        ({"head_dim": 256, "value_dim": 256, "deterministic": True}, ["flash", "flash_attn_2", "efficient"]),
        ({"head_dim": 224, "value_dim": 224, "capability": (8, 9)}, ["efficient"]),
        ({"head_dim": 264, "value_dim": 264}, ["efficient"]),
        ({"value_dim": 32}, ["cudnn", "efficient"]),
        ({"kv_heads": 2}, ["flash_attn_3", "flash_attn_4", "cudnn", "flash", "flash_attn_2"]),
        ({"deterministic": True}, ["flash_attn_3", "flash_attn_4", "flash", "flash_attn_2", "efficient"]),
        ({"max_seqlen": 1}, ["flash_attn_3", "flash_attn_4", "flash", "flash_attn_2", "efficient"]),
        ({"max_seqlen": None, "packed": True}, []),
        ({"scale": 0.0}, []),
        ({"scale": -0.1}, []),
        ({"batch": 65536}, []),
        ({"q_heads": 65536, "kv_heads": 65536}, []),
    ],
)
def test_limits(changes, takers, operators, packages, cudnn):
    assert [backend.name for backend in supporting(call(**changes))] == takers


@pytest.mark.parametrize(
    "name, changes, reason",
    [
        ("flash", {"dtype": torch.float32}, "it needs float16 or bfloat16, got torch.float32"),
        ("flash", {"capability": (7, 5)}, "it needs compute capability 8.0 or newer, got 7.5"),
        ("flash", {"value_dim": 32}, "it needs one head dim for q, k and v, got 64 and 32"),
        ("flash", {"packed": True, "max_seqlen": None}, "it needs max_seqlen, a bound on the packed lengths, got None"),
        ("cudnn", {"packed": True}, "it needs a dense batch, got a packed one"),
        ("cudnn", {"deterministic": True}, "it needs torch.use_deterministic_algorithms(False), got True"),
        ("efficient", {"kv_heads": 2}, "it needs as many key heads as query heads, got 4 and 2"),
        ("flash_attn_3", {"capability": (8, 0)}, "it needs compute capability 9.0, got 8.0"),
        ("flash_attn_4", {"head_dim": 192, "value_dim": 192}, "it needs a head dim up to 128, got 192"),
        ("flash", {"scale": -0.5}, "it needs a positive scale, got -0.5"),
    ],
)
def test_reasons(name, changes, reason, operators, packages, cudnn):
    assert BACKENDS[name].unsupported_reason(call(**changes)) == reason


def test_switches_are_respected(cudnn, monkeypatch):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for name, switch in zip(IN_TORCH, ("flash", "cudnn", "mem_efficient"), strict=True):
            reason = f"it needs torch.backends.cuda.enable_{switch}_sdp(True), got False"
            assert BACKENDS[name].unsupported_reason(call()) == reason
    assert BACKENDS["cudnn"].unsupported_reason(call()) is None
    monkeypatch.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")
    assert BACKENDS["cudnn"].unsupported_reason(call()) == "it needs TORCH_CUDNN_SDPA_AVOID_RECOMPILE unset, got 1"
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    assert BACKENDS["cudnn"].unsupported_reason(call()) == "it needs cuDNN 9.5.1 or newer, got 0"


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named(name, monkeypatch):
    for module in ("flash_attn", "flash_attn_3"):
        monkeypatch.setitem(sys.modules, module, None)
    package_unsupported_reason.cache_clear()
    assert BACKENDS[name].unsupported_reason(call()).startswith("it does not import: ")
    package_unsupported_reason.cache_clear()


@pytest.mark.parametrize(
    "name, module, function",
    [
        ("flash_attn_2", "flash_attn.flash_attn_interface", "_flash_attn_varlen_forward"),
        ("flash_attn_4", "flash_attn.cute.interface", "_flash_attn_bwd"),
    ],
)
def test_an_old_package_is_refused(name, module, function, packages, monkeypatch):
    monkeypatch.setattr(sys.modules[module], function, lambda q, k, v, window_size=(-1, -1): None)
    assert "or newer: its " + function in BACKENDS[name].unsupported_reason(call())


def test_call_of_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    (q, k, v), _ = draw("tokens first", (8, 100), dtype=torch.float16)
    assert Call.of(q, k, v, scale=0.125) == call()
    (q, k, v), options = draw("packed", (5, 0, 9), (4, 2), (64, 32), torch.float16)
    packed = call(batch=3, max_seqlen=9, packed=True, kv_heads=2, value_dim=32)
    assert Call.of(q, k, v, scale=0.125, **options) == packed
    torch.use_deterministic_algorithms(True)
    assert Call.of(q, k, v, scale=0.125, cu_seqlens=options["cu_seqlens"]) == packed._replace(
        max_seqlen=None, deterministic=True
    )


def test_register(monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", dict(BACKENDS))
    with pytest.raises(ValueError, match=r"name must be new to the registry, which has flash_attn_3, .*, got flash"):
        register(BACKENDS["flash"])
    mine = register(AttentionBackend("mine", lambda call: None, None, None, deterministic=False))
    assert supporting(call(dtype=torch.float64)) == [mine]


# --- On a GPU ---


def or_skip(backend: AttentionBackend, q, k, v, *, causal: bool, **options) -> None:
    reason = backend.unsupported_reason(Call.of(q, k, v, **options))
    if reason is not None:
        pytest.skip(reason)


def on_gpu(backend: AttentionBackend, *drawn, causal: bool, dim: int, **more) -> None:
    """Check a backend against the reference: as it is, and with a logit in each softmax and rows left out."""
    (q, k, v), options = draw(*drawn, device="cuda", **more)
    options |= {"causal": causal, "scale": dim**-0.5}
    or_skip(backend, q, k, v, **options)
    check(backend, q, k, v, **options)
    rows = q.shape[:-1]
    left_out = torch.rand(rows, device="cuda") < 0.2
    check(backend, q, k, v, **options, sink_logits=2 * torch.randn(q.shape[1], device="cuda"), left_out=left_out)


def groups_on_gpu(name: str) -> list[tuple[int, int]]:
    return [(4, 4)] if name == "efficient" else [(4, 4), (4, 2), (4, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BACKENDS)
def test_dense_on_gpu(name, dtype, dim, causal):
    same = {"causal": causal, "dim": dim, "dims": (dim, dim), "dtype": dtype}
    for heads in groups_on_gpu(name):
        for layout in ("heads first", "tokens first", "sliced"):
            on_gpu(BACKENDS[name], layout, (3, 129), heads=heads, **same)
    for length in (2, 63, 100, 192, 448):
        on_gpu(BACKENDS[name], "tokens first", (3, length), **same)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BACKENDS)
def test_packed_on_gpu(name, dtype, dim, causal):
    same = {"causal": causal, "dim": dim, "dims": (dim, dim), "dtype": dtype}
    for heads in groups_on_gpu(name):
        for lengths in [(100, 0, 63, 1, 129, 0), (448, 64)]:
            on_gpu(BACKENDS[name], "packed", lengths, heads=heads, **same)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout, lengths", [("tokens first", (3, 1)), ("packed", (0, 1)), ("packed", (1, 0, 1, 1))])
def test_single_tokens_on_gpu(layout, lengths, name):
    for heads in groups_on_gpu(name):
        on_gpu(BACKENDS[name], layout, lengths, causal=True, dim=64, heads=heads, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("layout, lengths", [("heads first", (3, 129)), ("packed", (100, 0, 63, 1))])
@pytest.mark.parametrize(
    "dims, dtype",
    [
        ((64, 32), torch.bfloat16),
        ((32, 64), torch.bfloat16),
        ((40, 40), torch.bfloat16),
        ((96, 96), torch.bfloat16),
        ((192, 192), torch.bfloat16),
        ((256, 256), torch.bfloat16),
        ((64, 64), torch.float32),
        ((20, 36), torch.float32),
    ],
)
@pytest.mark.parametrize("name", BACKENDS)
def test_other_dims_on_gpu(name, dims, dtype, layout, lengths):
    on_gpu(BACKENDS[name], layout, lengths, causal=True, dim=dims[0], dims=dims, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_misaligned_on_gpu(name):
    on_gpu(BACKENDS[name], "misaligned", (3, 129), causal=True, dim=64, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_large_scores_on_gpu(name):
    """lse far below and above 0, where an exponential of it would overflow."""
    for offset in (-8.0, 8.0):
        (q, k, v), _ = draw("tokens first", (2, 192), dtype=torch.bfloat16, device="cuda")
        q, k = q.clone(), k.clone()
        q[..., 0], k[..., 0] = 16.0, offset
        options = {"causal": True, "scale": 1.0}
        or_skip(BACKENDS[name], q, k, v, **options)
        left_out = torch.rand(q.shape[:-1], device="cuda") < 0.2
        check(BACKENDS[name], q, k, v, **options, left_out=left_out)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_layouts_of_dout_on_gpu(name):
    """Calls that differ in the layout of dout only: what an attention caches for one must not serve the other."""
    (q, k, v), _ = draw("heads first", (3, 129), dtype=torch.bfloat16, device="cuda")
    options = {"causal": True, "scale": 0.125}
    or_skip(BACKENDS[name], q, k, v, **options)
    for swap in (False, True, False):
        check(BACKENDS[name], q, k, v, **options, swap=swap)


@pytest.mark.gpu
@pytest.mark.parametrize("ours", [False, True], ids=["dout like q", "dout transposed"])
@pytest.mark.parametrize("theirs", [False, True], ids=["SDPA's like q", "SDPA's transposed"])
def test_cudnn_plans_of_others_on_gpu(theirs, ours):
    """PyTorch keeps plans of a backward by a key without dout's strides: ours must not be a plan that SDPA left there.

    A length of its own for each case: plans are kept for the life of the process.
    """
    (q, k, v), _ = draw("heads first", (2, 136 + 16 * theirs + 32 * ours), dtype=torch.bfloat16, device="cuda")
    options = {"causal": True, "scale": 0.125}
    or_skip(BACKENDS["cudnn"], q, k, v, **options)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, scale=0.125)
    dout = torch.randn_like(out)
    torch.autograd.grad(out, leaves, token_major(dout) if theirs else dout)
    check(BACKENDS["cudnn"], q, k, v, **options, swap=ours)


@pytest.mark.gpu
@pytest.mark.parametrize("layout, lengths", [("tokens first", (3, 448)), ("packed", (100, 0, 448, 1))])
@pytest.mark.parametrize("name", BACKENDS)
def test_determinism_on_gpu(name, layout, lengths):
    torch.use_deterministic_algorithms(True)
    (q, k, v), options = draw(layout, lengths, dtype=torch.bfloat16, device="cuda")
    options |= {"causal": True, "scale": 0.125}
    or_skip(BACKENDS[name], q, k, v, **options)
    out, lse = BACKENDS[name].forward(q, k, v, **options)
    first = BACKENDS[name].backward(out, q, k, v, out, lse, **options)
    for _ in range(10):
        again = BACKENDS[name].backward(out, q, k, v, out, lse, **options)
        assert all(a.equal(b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("layout, lengths", [("tokens first", (3, 129)), ("packed", (100, 0, 63, 1))])
@pytest.mark.parametrize("name", BACKENDS)
def test_no_synchronisation_on_gpu(name, layout, lengths):
    (q, k, v), options = draw(layout, lengths, dtype=torch.bfloat16, device="cuda")
    options |= {"causal": True, "scale": 0.125}
    or_skip(BACKENDS[name], q, k, v, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = BACKENDS[name].forward(q, k, v, **options)
        BACKENDS[name].backward(out, q, k, v, out, lse, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""sink_attention against eager PyTorch, SDPA with a dense bias and FlexAttention. Limit: attention without the bias."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import recattn
from benchmarks.harness import jagged
from benchmarks.harness.compiled import compiled
from benchmarks.harness.goals import ExtraMemoryGoal, Goal, MemoryGoal, TimeGoal
from benchmarks.harness.registry import BACKWARD, COMPILED, EAGER, FORWARD, TRAINING, Cost, Inputs, register
from benchmarks.harness.workloads import CPU, CUDA, SINK, Draw, SinkWorkload, offsets
from recattn import reference
from recattn._dispatch import format_implementation
from recattn.ops.backends import BACKENDS

# CTR-Sink multiplies the softmax that is its bias by 10 in its encoders.
BIAS_SCALE = 10


def draw_inputs(workload: SinkWorkload, draw: Draw) -> Inputs:
    if workload.histories:
        return _packed_histories(workload, draw)
    if workload.packed:
        return _packed_at_random(workload, draw)
    batch, length, dim = workload.batch, workload.length, workload.dim
    spots = [random_positions(length, workload.sinks, draw) for _ in range(batch)]
    return {
        "q": draw.normal(batch, workload.heads, length, dim),
        "k": draw.normal(batch, workload.kv_heads, length, dim),
        "v": draw.normal(batch, workload.kv_heads, length, dim),
        "sink_positions": draw.index(torch.stack(spots)),
        "inter_sink_bias": _bias(workload.batch, workload.sinks, draw),
        "causal": workload.causal,
        **({"dropout_p": workload.dropout_p} if workload.dropout_p else {}),
    }


def random_positions(length: int, sinks: int, draw: Draw) -> Tensor:
    return torch.randperm(length, generator=draw.structure)[:sinks].sort().values


def _packed_at_random(workload: SinkWorkload, draw: Draw) -> Inputs:
    lengths = (
        draw.zipf(workload.batch, workload.length)
        if workload.ragged
        else torch.full((workload.batch,), workload.others)
    )
    lengths[lengths.argmax()] = workload.length
    spots = [random_positions(n, n * workload.sinks // workload.length, draw) for n in lengths.tolist()]
    q, k, v = (draw.normal(int(lengths.sum()), heads, workload.dim) for heads in _head_counts(workload))
    return {
        "q": q,
        "k": k,
        "v": v,
        "sink_positions": draw.index(torch.nn.utils.rnn.pad_sequence(spots, batch_first=True, padding_value=-1)),
        "inter_sink_bias": _bias(workload.batch, workload.sinks, draw),
        "causal": workload.causal,
        "cu_seqlens": draw.index(offsets(lengths), torch.int32),
    }


def _packed_histories(workload: SinkWorkload, draw: Draw) -> Inputs:
    per_behavior, dim = workload.tokens_per_behavior, workload.dim
    histories = draw.histories.sample(workload.batch, longest=workload.sinks)
    behaviors = torch.tensor([len(history) for history in histories])
    # A token is the embedding of its behaviour plus noise.
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
        "cu_seqlens": draw.index(offsets(behaviors * per_behavior), torch.int32),
    }


def _head_counts(workload: SinkWorkload) -> tuple[int, int, int]:
    return workload.heads, workload.kv_heads, workload.kv_heads


def _bias(batch: int, sinks: int, draw: Draw) -> Tensor:
    return BIAS_SCALE * draw.normal(batch, 1, sinks, sinks).softmax(-1)


def cost(workload: SinkWorkload, inputs: Inputs, direction: str) -> Cost:
    """4·D operations per visible (query, key) and head. The backward counts as 2.5 forwards, as in FlashAttention."""
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


# SDPA's backends by name.
SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
UNBIASED = tuple(f"unbiased {backend}" for backend in SDPA_BACKENDS)
# Without cuDNN: PyTorch would build a new plan for it at every packed call.
UNBIASED_PACKED = ("unbiased varlen flash", "unbiased varlen efficient")
FLEX = "FlexAttention"
# No backward for cuDNN: the bias gets no gradient, and with a mask at N % 128 == 64 torch 2.11 gives NaN gradients.
DENSE_BIAS = {
    FORWARD: ("SDPA cuDNN, dense bias", "SDPA efficient, dense bias"),
    BACKWARD: ("SDPA efficient, dense bias",),
}


def cpu_goals() -> Iterator[Goal]:
    """Time vs unbiased attention, where at most a quarter of the tokens are sinks."""
    for workload in SINK:
        if "cpu" not in workload.devices or workload.tier == "quick":
            continue
        against, ratios = ("unbiased SDPA",), None
        if workload.histories:
            against, ratios = ("SDPA, dense bias, one by one",), (1 / 2, 1 / 2)
        elif workload.dropout_p:  # PyTorch has no fused attention with dropout on a CPU
            against, ratios = ("SDPA, dense bias", "unbiased SDPA"), (1 / 3, 1 / 3)
        elif not workload.packed and 4 * workload.sinks <= workload.length:
            ratios = (0.95, 0.85) if workload.length >= 512 else (0.7, 0.7) if workload.length <= 128 else None
        for direction, ratio in zip((FORWARD, TRAINING), ratios or (), strict=False):
            yield TimeGoal(workload=workload.name, direction=direction, against=against, time_ratio=ratio)
    yield MemoryGoal(workload="headline", direction=TRAINING, against=("unbiased SDPA",), memory_ratio=1.1)


def goals() -> Iterator[Goal]:
    """On a CPU, time vs unbiased attention; on a GPU, also speedup over the other implementations, and memory."""
    yield from cpu_goals()
    for workload in SINK:
        if workload.devices != CUDA or workload.name == "gpu_memory":
            continue
        for direction in (FORWARD, BACKWARD):
            if workload.packed:
                speeds = {UNBIASED_PACKED: 0.95, (FLEX,): 2.5}
            elif workload.length <= 512:
                speeds = {UNBIASED: 1.0, (FLEX,): 1.5, DENSE_BIAS[direction]: 3}
            elif direction == FORWARD:
                speeds = {UNBIASED: 0.97, (FLEX,): 1.8, DENSE_BIAS[direction]: 3}
            else:
                speeds = {UNBIASED: 0.95, (FLEX,): 2.5, DENSE_BIAS[direction]: 5}
            for against, speed in speeds.items():
                goal = {"workload": workload.name, "direction": direction, "against": against, "device": "cuda"}
                yield TimeGoal(**goal, time_ratio=1 / speed)
    yield ExtraMemoryGoal(
        workload="gpu_memory", direction=TRAINING, against=UNBIASED, device="cuda", extra_bytes=46_000_000
    )
    yield from jagged.goals(SINK)


GRADS = ("q", "k", "v", "inter_sink_bias")
SINK_ATTENTION = register(
    "sink_attention", reference.sink_attention, draw_inputs, cost, grads=GRADS, workloads=SINK, goals=tuple(goals())
)


def with_longest(inputs: Inputs) -> Inputs:
    """Add `max_seqlen` to packed sequences: their kernels need it on the host."""
    if "cu_seqlens" not in inputs:
        return inputs
    return {**inputs, "max_seqlen": int(inputs["cu_seqlens"].diff().max())}


def needs_cuda(workload: SinkWorkload, device: torch.device) -> str | None:
    return None if device.type == "cuda" else "it needs a CUDA device"


# What recattn can be told to run on a GPU: the fused kernel, or the correction of an unbiased attention.
PATHS = ("triton", *(format_implementation("correction", backend) for backend in BACKENDS))

SINK_ATTENTION.implementation("recattn", prepare=with_longest, ours=True)(recattn.sink_attention)
for path in PATHS:
    SINK_ATTENTION.implementation(
        f"recattn {path}", prepare=with_longest, unsupported_reason=needs_cuda, devices=CUDA, ours=True
    )(partial(recattn.sink_attention, impl=path))
jagged.add_nested(SINK_ATTENTION, recattn.sink_attention, "qkv", with_longest)


def pad(inputs: Inputs) -> Inputs:
    """Pad packed sequences to [B, H, N, D] with `valid` [B, N]; other inputs stay as they are."""
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
    # Position -1 indexes the last row and column, which are cut off.
    extra = 0 if valid is None else 1
    dense = inter_sink_bias.new_zeros(batch, heads, length + extra, length + extra)
    b = torch.arange(batch, device=q.device)[:, None, None, None]
    h = torch.arange(heads, device=q.device)[:, None, None]
    dense[b, h, sink_positions[:, None, :, None], sink_positions[:, None, None, :]] = inter_sink_bias
    dense = dense[..., :length, :length]
    return dense if valid is None else dense.masked_fill(~valid[:, None, None, :], -math.inf)


def future_mask(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def padded(workload: SinkWorkload) -> bool:
    """Whether padding to the longest sequence is realistic."""
    return workload.others is None


@SINK_ATTENTION.implementation(EAGER, applies=padded, prepare=pad, restore=unpad)
def eager(q, k, v, sink_positions, inter_sink_bias, causal, valid=None, dropout_p=0.0):
    return biased_attention(q, k, v, dense_bias(q, sink_positions, inter_sink_bias, valid), causal, dropout_p)


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, causal: bool, dropout_p: float = 0.0) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias
    if causal:
        scores = scores.masked_fill(future_mask(q.shape[2], q.device), -math.inf)
    return F.dropout(scores.softmax(-1), dropout_p) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: str | None = None, **options):
    options["enable_gqa"] = q.shape[1] != k.shape[1]
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, mask, **options)
    with sdpa_kernel(SDPA_BACKENDS[backend]):
        try:
            return F.scaled_dot_product_attention(q, k, v, mask, **options)
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            raise NotImplementedError(f"SDPA's {backend} backend does not serve this call") from error


def sdpa_dense_bias(q, k, v, sink_positions, inter_sink_bias, causal, valid=None, backend=None, dropout_p=0.0):
    mask = dense_bias(q, sink_positions, inter_sink_bias, valid)
    if causal:
        mask = mask.masked_fill(future_mask(q.shape[2], q.device), -math.inf)
    # torch 2.11 accepts a float32 mask with bfloat16 inputs, and misreads it.
    return sdpa(q, k, v, mask.to(q.dtype), backend, dropout_p=dropout_p)


SINK_ATTENTION.implementation("SDPA, dense bias", applies=padded, prepare=pad, restore=unpad, devices=CPU)(
    sdpa_dense_bias
)
for backend in ("cuDNN", "efficient"):
    SINK_ATTENTION.implementation(
        f"SDPA {backend}, dense bias",
        applies=padded,
        prepare=pad,
        restore=unpad,
        unsupported_reason=needs_cuda,
        devices=CUDA,
        forward_only=lambda device, backend=backend: backend == "cuDNN",
    )(partial(sdpa_dense_bias, backend=backend))


@SINK_ATTENTION.implementation("SDPA, dense bias, one by one", applies=lambda workload: workload.packed)
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


@SINK_ATTENTION.implementation(
    "official formulation",
    applies=lambda workload: not workload.packed and workload.length <= 512,  # CTR-Sink's own
    cpu_tier="full",
)
def official(q, k, v, sink_positions, inter_sink_bias, causal, dropout_p=0.0):
    """CTR-Sink's code: a dense bias, and all scores in memory."""
    return biased_attention(q, k, v, official_bias(inter_sink_bias, sink_positions, q.shape[2]), causal, dropout_p)


def official_bias(inter_sink_bias: Tensor, sink_positions: Tensor, length: int) -> Tensor:
    """[B, H, N, N], filled one sequence at a time."""
    dense = []
    for own, positions in zip(inter_sink_bias, sink_positions, strict=True):
        empty = own.new_zeros(own.shape[0], length, length)
        heads = torch.arange(own.shape[0], device=own.device)[:, None, None]
        dense.append(empty.index_put((heads, positions[:, None], positions[None, :]), own))
    return torch.stack(dense)


SINK_ATTENTION.add_compiled(COMPILED, eager, applies=padded, prepare=pad, restore=unpad, tier="full", cpu_tier=None)


def prepare_flex(inputs: Inputs, block_rows: int = 128) -> Inputs:
    """[B, H, N, D]; packed sequences become one, with a block mask that separates them.

    `sink_of` [B, N] is the index of the sink at a token; at other tokens it is that of the sink before. `is_sink` tells
    them apart. (The gradient of the bias is accumulated with atomic adds, zeros included; if all non-sinks had the same
    index, those adds would collide on one entry.)
    """
    q, k, v, positions, causal = (inputs[name] for name in ("q", "k", "v", "sink_positions", "causal"))
    sequence_of, before = None, torch.zeros((), dtype=torch.int64, device=q.device)
    if "cu_seqlens" in inputs:
        q, k, v = (x.transpose(0, 1).unsqueeze(0).contiguous() for x in (q, k, v))
        starts, lengths = inputs["cu_seqlens"][:-1].long(), inputs["cu_seqlens"].diff()
        sequence_of = torch.arange(len(lengths), device=q.device, dtype=torch.int32).repeat_interleave(lengths)  # [T]
        real = positions >= 0
        positions = (positions + starts[:, None])[real].unsqueeze(0)
        before = (real.sum(1).cumsum(0) - real.sum(1))[sequence_of]  # number of sinks in earlier sequences
    batch, length = q.shape[0], q.shape[2]
    is_sink = torch.zeros(batch, length, dtype=torch.bool, device=q.device).scatter(1, positions, True)
    sink_of = (is_sink.cumsum(1) - 1 - before).clamp(min=0).int()

    def visible(b, h, i, j):
        own = i >= 0 if sequence_of is None else sequence_of[i] == sequence_of[j]
        return own & (i >= j) if causal else own

    unmasked = sequence_of is None and not causal
    where = {"device": q.device, "BLOCK_SIZE": (block_rows, 128)}
    block_mask = None if unmasked else create_block_mask(visible, None, None, length, length, **where)
    bias = inputs["inter_sink_bias"]
    own = {"sequence_of": sequence_of, "sink_of": sink_of, "is_sink": is_sink, "block_mask": block_mask}
    return {"q": q, "k": k, "v": v, "inter_sink_bias": bias, **own}


def restore_flex(output: Tensor, inputs: Inputs) -> Tensor:
    return output[0].transpose(0, 1) if "cu_seqlens" in inputs else output


def flex_with_bias(attention, q, k, v, inter_sink_bias, sequence_of, sink_of, is_sink, block_mask, **options):
    bias = inter_sink_bias.float()  # so that its gradient accumulates in float32

    def add_bias(score, b, h, i, j):
        sequence = b if sequence_of is None else sequence_of[i]
        return score + torch.where(is_sink[b, i] & is_sink[b, j], bias[sequence, 0, sink_of[b, i], sink_of[b, j]], 0)

    grouped = q.shape[1] != k.shape[1]
    return attention(q, k, v, score_mod=add_bias, block_mask=block_mask, enable_gqa=grouped, **options)


@SINK_ATTENTION.implementation(
    FLEX,
    applies=lambda workload: workload.sinks > 0,  # FlexAttention cannot capture an empty tensor
    prepare=prepare_flex,
    restore=restore_flex,
    forward_only=lambda device: device.type == "cpu",  # it has no backward on a CPU
    devices=CUDA,
    compiled=True,
)
def flex(**inputs):
    return flex_with_bias(compiled(flex_attention), **inputs)


def without_bias(q, k, v, sink_positions, inter_sink_bias, **options):
    return reference.sink_attention(q, k, v, sink_positions[:, :0], inter_sink_bias[..., :0, :0], **options)


UNBIASED_OPTIONS = {"reference": without_bias, "grads": ("q", "k", "v")}


def unbiased_sdpa(q, k, v, sink_positions, inter_sink_bias, causal, valid=None, backend=None, dropout_p=0.0):
    mask = None if valid is None else valid[:, None, None, :]
    return sdpa(q, k, v, mask, backend, is_causal=causal, dropout_p=dropout_p)


SINK_ATTENTION.implementation(
    "unbiased SDPA", applies=padded, prepare=pad, restore=unpad, devices=CPU, **UNBIASED_OPTIONS
)(unbiased_sdpa)


@SINK_ATTENTION.implementation(
    "unbiased SDPA, one by one", applies=lambda workload: workload.packed, devices=CPU, **UNBIASED_OPTIONS
)
def unbiased_one_by_one(q, k, v, sink_positions, inter_sink_bias, causal, cu_seqlens):
    outputs = []
    for start, stop in pairwise(cu_seqlens.tolist()):
        sequence = (x[start:stop].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        outputs.append(sdpa(*sequence, None, is_causal=causal)[0].transpose(0, 1))
    return torch.cat(outputs)


for name, backend in zip(UNBIASED, SDPA_BACKENDS, strict=True):
    SINK_ATTENTION.implementation(
        name,
        applies=lambda workload: not workload.packed,
        unsupported_reason=needs_cuda,
        devices=CUDA,
        **UNBIASED_OPTIONS,
    )(partial(unbiased_sdpa, backend=backend))


# The operators beneath PyTorch's attention over packed and nested sequences, without their wrappers' time.


def varlen_flash(q, k, v, sink_positions, inter_sink_bias, causal, cu_seqlens, max_seqlen):
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, causal, False)[0]


def varlen_efficient(q, k, v, sink_positions, inter_sink_bias, causal, cu_seqlens, max_seqlen):
    lengths, wants_lse = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen), q.requires_grad
    q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    return torch.ops.aten._efficient_attention_forward(q, k, v, None, *lengths, 0.0, int(causal), wants_lse)[0][0]


for name, function in zip(UNBIASED_PACKED, (varlen_flash, varlen_efficient), strict=True):
    SINK_ATTENTION.implementation(
        name,
        applies=lambda workload: workload.packed,
        prepare=with_longest,
        unsupported_reason=needs_cuda,
        devices=CUDA,
        **UNBIASED_OPTIONS,
    )(function)


def missing(module: str) -> Callable[[SinkWorkload, torch.device], str | None]:
    """Check whether a library for GPUs can be used, and why not."""

    def why(workload: SinkWorkload, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "it needs a CUDA device"
        try:
            import_module(module)
        except Exception as error:  # often it is there, but built for another torch
            return f"{module} cannot be imported: {type(error).__name__}: {error}".partition("\n")[0]
        return None

    return why


def tokens_first(inputs: Inputs) -> Inputs:
    """[B, N, H, D], the layout of FlashAttention and xFormers. Packed sequences, [T, H, D], have it already."""
    if "cu_seqlens" in inputs:
        return with_longest(inputs)
    return {**inputs, **{name: inputs[name].transpose(1, 2) for name in ("q", "k", "v")}}


def heads_first(output: Tensor, inputs: Inputs) -> Tensor:
    return output if "cu_seqlens" in inputs else output.transpose(1, 2)


def flash_attention(module, q, k, v, sink_positions, inter_sink_bias, causal, cu_seqlens=None, max_seqlen=None):
    library = import_module(module)
    if cu_seqlens is None:
        output = library.flash_attn_func(q, k, v, causal=causal)
    else:
        lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        lengths |= {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}
        output = library.flash_attn_varlen_func(q, k, v, **lengths, causal=causal)
    return output[0] if isinstance(output, tuple) else output  # some versions also return the log-sum-exp


for version, module in {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}.items():
    SINK_ATTENTION.implementation(
        f"unbiased FlashAttention {version}",
        prepare=tokens_first,
        restore=heads_first,
        unsupported_reason=missing(module),
        devices=CUDA,
        **UNBIASED_OPTIONS,
    )(partial(flash_attention, module))


# FlexAttention on FlashAttention 4's kernels. They take float16 and bfloat16.
FLASH = {"kernel_options": {"BACKEND": "FLASH"}}


def no_flex_flash(workload: SinkWorkload, device: torch.device) -> str | None:
    reason = missing("flash_attn.cute")(workload, device)
    if reason is not None:
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    # On 8.x they take no score_mod, on 12.x no block mask.
    return None if major in (9, 10, 11) else f"it needs compute capability 9.x, 10.x or 11.x, got {major}.{minor}"


def prepare_flex_flash(inputs: Inputs) -> Inputs:
    """As `prepare_flex`, but Blackwell's kernels take two tiles of 128 rows at a time."""
    device = inputs["q"].device
    blackwell = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10
    return prepare_flex(inputs, 256 if blackwell else 128)


FLASH_OPTIONS = {
    "prepare": prepare_flex_flash,
    "restore": restore_flex,
    "unsupported_reason": no_flex_flash,
    "devices": CUDA,
    "compiled": True,
}


@SINK_ATTENTION.implementation(
    f"{FLEX} FLASH",
    applies=lambda workload: workload.sinks > 0,
    forward_only=lambda device: True,  # it gives captured tensors, here the bias, no gradient
    **FLASH_OPTIONS,
)
def flex_flash(**inputs):
    return flex_with_bias(compiled(flex_attention), **inputs, **FLASH)


@SINK_ATTENTION.implementation(f"unbiased {FLEX} FLASH", **FLASH_OPTIONS, **UNBIASED_OPTIONS)
def unbiased_flex_flash(q, k, v, block_mask, **others):
    return compiled(flex_attention)(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1], **FLASH)


def prepare_xformers(inputs: Inputs) -> Inputs:
    """[B, N, H, D], packed sequences as one, with xFormers' mask."""
    from xformers.ops import fmha

    inputs, causal = tokens_first(inputs), inputs["causal"]
    if "cu_seqlens" not in inputs:
        return {**inputs, "mask": fmha.LowerTriangularMask() if causal else None}
    mask = fmha.BlockDiagonalMask.from_seqlens(inputs["cu_seqlens"].diff().tolist(), device=inputs["q"].device)
    packed = {name: inputs[name].unsqueeze(0) for name in ("q", "k", "v")}
    return {**inputs, **packed, "mask": mask.make_causal() if causal else mask}


def restore_xformers(output: Tensor, inputs: Inputs) -> Tensor:
    return output.squeeze(0) if "cu_seqlens" in inputs else output.transpose(1, 2)


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, mask: object) -> Tensor:
    """Grouped heads are repeated within the timed call, because xFormers' backward does not support groups."""
    from xformers.ops import memory_efficient_attention

    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) if groups > 1 else x for x in (k, v))
    return memory_efficient_attention(q, k, v, attn_bias=mask)


@SINK_ATTENTION.implementation(
    "unbiased xFormers",
    prepare=prepare_xformers,
    restore=restore_xformers,
    unsupported_reason=missing("xformers.ops"),
    devices=CUDA,
    **UNBIASED_OPTIONS,
)
def unbiased_xformers(q, k, v, mask, **others):
    return xformers_attention(q, k, v, mask)


@SINK_ATTENTION.implementation(
    "xFormers, dense bias",
    applies=lambda workload: not workload.packed and workload.length % 8 == 0,  # its kernels need that alignment
    prepare=tokens_first,
    restore=heads_first,
    unsupported_reason=missing("xformers.ops"),
    devices=CUDA,
)
def xformers_dense_bias(q, k, v, sink_positions, inter_sink_bias, causal):
    mask = dense_bias(q.transpose(1, 2), sink_positions, inter_sink_bias, None)
    if causal:
        mask = mask.masked_fill(future_mask(q.shape[1], q.device), -math.inf)
    return xformers_attention(q, k, v, mask.to(q.dtype).expand(-1, q.shape[2], -1, -1))

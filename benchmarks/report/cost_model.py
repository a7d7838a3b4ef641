"""Predicts how long recattn's kernels should take.

A call is a sequence of stages. A stage multiplies matrices, takes softmaxes, moves bytes and is launched:

    t = launches · t_launch + max(FLOPs / matmul rate + elements / softmax rate, bytes / copy rate)

The rates are measured on the device (`benchmarks.harness.ceilings`). For a device that nobody has measured they come
from its datasheet, times the share of it that similar devices reach. Matmul and softmax do not overlap: that predicts
the best attention on an H100 at head dim 64. No rate is fitted to a measurement of recattn. Where measured and
predicted times differ, `benchmarks.report.reasons` says why.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from benchmarks.data import movielens
from benchmarks.harness.ceilings import Ceilings
from benchmarks.harness.registry import BACKWARD, FORWARD, TRAINING, Inputs, Operator
from benchmarks.harness.workloads import BOTH, Draw, Workload
from benchmarks.operators.lrea_attention import absorbed_cost, compress_cost, compress_items_cost
from benchmarks.operators.refined_attention import cost as refined_cost
from benchmarks.operators.wasserstein_attention import cost as wasserstein_cost

# A measured time that differs more from the prediction needs a reason.
TOLERANCE = 0.25


@dataclass(frozen=True)
class Stage:
    flops: float
    bytes: float
    softmaxes: float = 0.0  # elements
    launches: int = 1

    def milliseconds(self, device: "Device", dtype: torch.dtype) -> float:
        ceilings = device.ceilings
        matrix = self.flops / ceilings.tflops[dtype] / 1e9
        softmax = self.softmaxes / ceilings.gsoftmax / 1e6
        return self.launches * ceilings.launch_us / 1e3 + max(matrix + softmax, self.bytes / ceilings.gbs / 1e6)


@dataclass(frozen=True)
class Device:
    name: str
    type: str
    ceilings: Ceilings


def gpu(name: str, tflops: float, gbs: float, multiprocessors: int, ghz: float) -> Device:
    """Rates of bfloat16 matmul and copy, 16 exponentials per clock and multiprocessor, and 2 µs per kernel."""
    return Device(name, "cuda", Ceilings({torch.bfloat16: tflops}, gbs, 16 * multiprocessors * ghz, launch_us=2.0))


# A large matmul and a large copy in PyTorch reached 80% and 90% of the datasheet on an H100 and an H200. The others are
# assumed to do the same. Clocks are the datasheets' boost clocks.
GPUS = (
    gpu("A100", 0.8 * 312, 0.9 * 2039, 108, 1.41),
    gpu("H100", 798, 3000, 132, 1.98),
    gpu("H200", 788, 4300, 132, 1.98),
    gpu("B200", 0.8 * 2250, 0.9 * 8000, 148, 1.965),
)


class ShapeDraw(Draw):
    """Draws the structure of a workload (lengths, positions, offsets) without its values."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(0, dtype, torch.device("cpu"), _histories())

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def embeddings(self, histories, dim: int, padding_side: str = "right") -> Tensor:
        return self.normal(len(histories), max(map(len, histories)), dim)


_histories = cache(movielens.drawn)


@cache
def shapes(draw: Callable[[Workload, Draw], Inputs], workload: Workload, dtype: torch.dtype) -> Inputs:
    return draw(workload, ShapeDraw(dtype))


# The stages of a forward or of a backward alone.
Model = Callable[[Workload, Inputs, str], list[Stage]]
MODELS: dict[tuple[str, str], Model] = {}  # by operator and type of device


def models(operator: str, *types: str) -> Callable[[Model], Model]:
    """Decorator: the function models an operator on the given types of device."""

    def add(model: Model) -> Model:
        MODELS.update({(operator, type): model for type in types})
        return model

    return add


def predict(operator: Operator, workload: Workload, direction: str, device: Device, dtype: torch.dtype) -> float | None:
    """Predicted milliseconds of a call of recattn; None if it has no model."""
    model = MODELS.get((operator.name, device.type))
    if model is None:
        return None
    inputs = shapes(operator.inputs, workload, dtype)
    passes = (FORWARD, BACKWARD) if direction == TRAINING else (direction,)
    return sum(stage.milliseconds(device, dtype) for one in passes for stage in model(workload, inputs, one))


def _bytes(inputs: Inputs, *names: str) -> float:
    return float(sum(inputs[name].nbytes for name in names if name in inputs))


# --- sink_attention ---


# Keys that an attention processes at a time. Hidden keys in a block are computed too.
KEY_BLOCK = {"cpu": 512, "cuda": 128}


@models("sink_attention", "cpu")
def sink_attention_on_a_cpu(workload, inputs, direction):
    return corrected_attention(workload, inputs, direction, KEY_BLOCK["cpu"])


@models("sink_attention", "cuda")
def sink_attention_on_a_gpu(workload, inputs, direction):
    return corrected_attention(workload, inputs, direction, KEY_BLOCK["cuda"])


def corrected_attention(workload, inputs, direction, key_block) -> list[Stage]:
    """An unbiased attention, then the correction at the sinks. (The fused kernel has only the first stage.)"""
    q, k = inputs["q"], inputs["k"]
    cu_seqlens, positions = inputs.get("cu_seqlens"), inputs["sink_positions"]
    lengths = torch.full((len(positions),), workload.length) if cu_seqlens is None else cu_seqlens.diff()
    sinks = (positions >= 0).sum(1)
    share = float(sinks.sum() / lengths.sum())
    pairs = workload.heads * (_computed(lengths, key_block) if workload.causal else _visible(lengths, False))
    sink_pairs = workload.heads * _visible(sinks, workload.causal)
    lse = 4 * q.numel() / workload.dim
    bias = _bytes(inputs, "inter_sink_bias")
    if direction == FORWARD:
        moved = 2 * q.nbytes + 2 * k.nbytes
        return [
            Stage(4 * workload.dim * pairs, moved + lse, pairs),
            Stage(4 * workload.dim * sink_pairs, share * (moved + q.nbytes + 2 * lse) + bias, 2 * sink_pairs),
        ]
    moved = 4 * q.nbytes + 4 * k.nbytes
    return [
        Stage(10 * workload.dim * pairs, moved + lse, pairs, launches=3),
        Stage(10 * workload.dim * sink_pairs, share * (moved + lse) + 2 * bias, 2 * sink_pairs, launches=2),
    ]


def _computed(lengths: Tensor, block: int) -> float:
    """(query, key) pairs computed by a causal attention that processes keys in blocks."""
    whole = lengths // block  # query blocks with a whole key block on the diagonal
    rest = lengths - block * whole
    return float((block * block * whole * (whole + 1) // 2 + rest * lengths).double().sum())


def _visible(lengths: Tensor, causal: bool) -> float:
    n = lengths.double()
    return float((n * (n + 1) / 2 if causal else n * n).sum())


# --- refined_attention ---


def _lengths(workload, inputs) -> Tensor:
    lengths = inputs.get("seq_lens")
    return torch.full((workload.batch,), workload.length) if lengths is None else lengths


def _softmaxes(workload) -> int:
    return (1 if workload.mechanism == "simple" else 2) + (workload.source == "weights")


@models("refined_attention", "cpu")
def refined_attention_on_a_cpu(workload, inputs, direction):
    """The fewest matmuls. The backward recomputes the forward and has two matmuls for each of it."""
    forward = refined_cost(workload, inputs, FORWARD)
    elements = _softmaxes(workload) * workload.heads * _visible(_lengths(workload, inputs), causal=True)
    if direction == FORWARD:
        return [Stage(forward.flops, forward.bytes, elements)]
    return [Stage(3 * forward.flops, 2 * forward.bytes, elements)]


@models("refined_attention", "cuda")
def refined_attention_on_a_gpu(workload, inputs, direction):
    """Up to 128 tokens: one program, in tiles of a power of two. Longer: linear projection, then attention."""
    q, dim, heads, n = inputs["q"], workload.dim, workload.heads, workload.length
    weights = _bytes(inputs, "w_q", "w_k", "w_v")
    if n <= 128:
        tile = max(16, 2 ** math.ceil(math.log2(n)))
        pairs = len(q) * heads * tile**2
        products = 4 * tile if workload.mechanism == "simple" else 6 * tile
        flops, moved, elements = pairs * (products + 4 * dim), 4 * q.nbytes + weights, _softmaxes(workload) * pairs
        if direction == FORWARD:
            return [Stage(flops, moved, elements)]
        return [Stage(3 * flops, 2 * moved, elements, launches=2)]
    rank = inputs["w_q"].shape[1]
    pairs = heads * _visible(_lengths(workload, inputs), causal=True)
    refined = q.nbytes / dim * 2 * rank  # Q' and K'
    # Segments are about as long as the state, so the work within them equals the work with the states.
    projection = Stage(16 * q.numel() * rank, 2 * q.nbytes + weights + refined, launches=2)
    attention = Stage(2 * (rank + dim) * pairs, refined + 2 * q.nbytes, pairs)
    if direction == FORWARD:
        return [projection, attention]
    return [
        projection,
        Stage((6 * rank + 4 * dim) * pairs, 2 * refined + 4 * q.nbytes, pairs, launches=3),
        Stage(3 * projection.flops, 2 * projection.bytes, launches=6),
    ]


# --- wasserstein_attention ---


@models("wasserstein_attention", *BOTH)
def wasserstein_attention(workload, inputs, direction):
    """The backward has five matmuls for the forward's two, as in any attention."""
    forward = wasserstein_cost(workload, inputs, FORWARD)
    pairs = workload.heads * _visible(_lengths(workload, inputs), causal=True)
    if direction == FORWARD:
        return [Stage(forward.flops, forward.bytes, pairs, launches=2)]
    return [Stage(2.5 * forward.flops, 2 * forward.bytes, pairs, launches=2)]


# --- lrea_attention ---


@models("lrea_absorbed_attention", *BOTH)
def lrea_absorbed_attention(workload, inputs, direction):
    return [Stage(*absorbed_cost(workload, inputs, direction))]


@models("lrea_compress", *BOTH)
def lrea_compress(workload, inputs, direction):
    """The backward has a matmul for each gradient, and writes that of the behaviours including padding."""
    forward = compress_cost(workload, inputs, FORWARD)
    if direction == FORWARD:
        return [Stage(*forward)]
    return [Stage(2 * forward.flops, forward.bytes + inputs["behaviors"].nbytes, launches=2)]


@models("lrea_compress_items", *BOTH)
def lrea_compress_items(workload, inputs, direction):
    return [Stage(*compress_items_cost(workload, inputs, direction))]


@models("lrea_attention", *BOTH)
def lrea_attention(workload, inputs, direction):
    """Matmuls of each user's targets and state, with the middle factor between; its backward has five for its two."""
    targets, keys, w_decomp = (inputs[name] for name in ("targets", "keys", "w_decomp"))
    rank = workload.rank
    scored = float((inputs["target_offsets"].diff() * inputs["seq_lens"]).sum())
    scores = targets.nbytes / workload.dim * rank
    ragged = Stage(2 * rank * targets.numel(), targets.nbytes + keys.nbytes + scores)
    if direction == FORWARD:
        return [ragged, Stage(4 * rank * scored, 2 * scores + w_decomp.nbytes), ragged]
    both = Stage(2 * ragged.flops, 2 * ragged.bytes, launches=2)
    return [both, Stage(10 * rank * scored, 4 * scores + 2 * w_decomp.nbytes, launches=2), both]


# --- inter_sink_bias ---


@models("inter_sink_bias", *BOTH)
def inter_sink_bias(workload, inputs, direction):
    q = inputs["q_s"]  # [B, H, M, d]
    elements = q.numel() / q.shape[-1] * q.shape[-2]
    bias = elements / q.shape[1] * q.element_size()
    if direction == FORWARD:
        return [Stage(2 * q.shape[-1] * elements, 2 * q.nbytes + bias, elements)]
    return [Stage(6 * q.shape[-1] * elements, 4 * q.nbytes + bias, elements)]


# --- A layer of BERT ---


@models("bert_layer", *BOTH)
def bert_layer(workload, inputs, direction):
    """Eight matmuls (12 · hidden size² per token), two normalisations, and attention with its bias."""
    hidden = inputs["hidden"]
    tokens, size = workload.batch * workload.length, workload.heads * workload.dim
    heads = {name: torch.empty(1, dtype=hidden.dtype, device="meta").expand(hidden.shape) for name in ("q", "k", "v")}
    bias = hidden.new_empty(workload.batch, 1, workload.sinks, workload.sinks)
    attention = {**heads, "sink_positions": inputs["sink_positions"], "inter_sink_bias": bias}
    passes = 1 if direction == FORWARD else 2
    # Activations in hidden sizes: the matmuls read 9 and write 9; the operations between them move 16.
    products = Stage(passes * 24 * tokens * size**2, passes * 18 * hidden.nbytes, launches=passes * 6)
    between = Stage(0, passes * 16 * hidden.nbytes, launches=passes * 4)
    return [products, between, *corrected_attention(workload, attention, direction, key_block=1)]

"""What recattn's operators launch on a GPU in bfloat16: kernels, blocks, rounds of their main loops, and bytes.

Tensors that one launch writes and the next reads within a chunk that fits the second-level cache do not count as bytes.
"""

import math
from collections import Counter

from torch import Tensor

from benchmarks.harness.registry import FORWARD
from benchmarks.operators.lrea_attention import absorbed_cost, compress_cost, compress_items_cost
from benchmarks.report import cpu_models
from benchmarks.report.cpu_models import unbiased_attention
from benchmarks.report.instructions import Kernel, Launch, find
from benchmarks.report.stages import MODELS, Stage, bytes_of, lengths_of, models
from recattn.ops.sink_attention.dispatch import FUSED, Shape, ranking

# Keys that FlashAttention processes at a time.
KEY_BLOCK = 128


def cdiv(a: float, b: int) -> int:
    return math.ceil(a / b)


def width_of(size: int) -> int:
    """Of a tile: a power of two, 16 or more."""
    return max(16, 2 ** math.ceil(math.log2(size)))


def rounds_of(rows: int, keys: int, block_m: int, block_n: int, causal: bool) -> int:
    """Blocks of keys that the tiles of some rows visit. The rows lie evenly among the keys."""
    tiles = cdiv(rows, block_m)
    if not causal:
        return tiles * cdiv(keys, block_n)
    lasts = (min(keys, cdiv(keys * (i + 1) * block_m, rows)) for i in range(tiles))
    return sum(cdiv(last, block_n) for last in lasts)


# --- sink_attention ---


def sequences_of(workload, inputs) -> Counter[tuple[int, int]]:
    """How many sequences have so many tokens and sinks."""
    positions = inputs["sink_positions"]
    sinks = (positions >= 0).sum(1).tolist()
    return Counter(zip(lengths_of(workload, inputs).tolist(), sinks, strict=True))


@models("sink_attention", "cuda", "recattn triton")
def fused_sink_attention(workload, inputs, direction, device) -> list[Launch]:
    """Queries come as two streams. A tile of sinks visits the sinks, then all keys; any other tile all keys."""
    q, k = inputs["q"], inputs["k"]
    dim, heads, causal = workload.dim, workload.heads, workload.causal
    sequences, architecture = sequences_of(workload, inputs), device.architecture
    lse = 4 * q.numel() / dim

    def rows_launch(name: str, bytes: float) -> Launch:
        kernel = find(name, architecture, D=dim)
        block_m, block_n = kernel.tile
        blocks = rounds = 0.0
        for (n, m), count in sequences.items():
            blocks += count * (cdiv(m, block_m) + cdiv(n - m, block_m))
            if m:
                rounds += count * rounds_of(m, n, block_m, block_n, causal)
                rounds += count * rounds_of(m, m, block_m, 16, causal) * 16 / block_n
            if n > m:
                rounds += count * rounds_of(n - m, n, block_m, block_n, causal)
        return Launch(kernel, heads * blocks, bytes, heads * rounds)

    bias = bytes_of(inputs, "inter_sink_bias")
    if direction == FORWARD:
        tokens = q.numel() / (heads * dim)
        blocks = cdiv(tokens, 1024)
        streams = Launch(find("sink_attention_streams_kernel", architecture), blocks, 5 * tokens, blocks)
        return [streams, rows_launch("sink_attention_fwd_kernel", 2 * q.nbytes + 2 * k.nbytes + lse + bias)]
    # dQ's launch leaves four float32 of each row for the other.
    dq = rows_launch("sink_attention_bwd_dq_kernel", 4 * q.nbytes + 2 * k.nbytes + 5 * lse + bias)
    kernel = find("sink_attention_bwd_dkdv_kernel", architecture, D=dim)
    block_m, block_n = kernel.tile
    rounds = heads * sum(c * rounds_of(n, n, block_n, block_m, causal) for (n, _), c in sequences.items())
    blocks = workload.kv_heads * sum(c * cdiv(n, block_n) for (n, _), c in sequences.items())
    dkdv = Launch(kernel, blocks, 2 * q.nbytes + 4 * k.nbytes + 4 * lse, rounds)
    return [dq, dkdv, *sink_pairs(workload, inputs, device, corrects=False)]


def sink_pairs(workload, inputs, device, corrects: bool) -> list[Launch]:
    """Gradients of the pairs of sinks: dK and dV; dβ; and where an unbiased attention is corrected dQ.

    They have 4, 2 and 3 products. The main loop is that of dK and dV.
    """
    kind = "corrects" if corrects else "fused"
    kernel = find("sink_attention_pairs_bwd_kernel", device.architecture, kind, D=workload.dim)
    block_m, block_n = kernel.tile
    programs = rounds = 0.0
    sequences = sequences_of(workload, inputs)
    for (_, m), count in sequences.items():
        if m:
            rows, keys = cdiv(m, block_m), cdiv(m, block_n)
            programs += count * (workload.kv_heads * keys + (workload.heads * rows if corrects else 0) + rows * keys)
            each = workload.heads * rounds_of(m, m, block_m, block_n, workload.causal)
            rounds += count * each * (4 + 2 + (3 if corrects else 0)) / 4
    if not programs:
        return []
    q, k = inputs["q"], inputs["k"]
    share = sum(m * count for (_, m), count in sequences.items()) * workload.dim * workload.heads / q.numel()
    moved = share * ((3 if corrects else 2) * q.nbytes + 4 * k.nbytes) + 2 * bytes_of(inputs, "inter_sink_bias")
    return [Launch(kernel, programs, moved, rounds)]


@models("sink_attention", "cuda", "recattn correction")
def corrected_sink_attention(workload, inputs, direction, device) -> list[Stage | Launch]:
    """PyTorch's flash attention, then the correction at the sinks."""
    unbiased = unbiased_attention(workload, inputs, direction, KEY_BLOCK)
    q, k, dim, heads = inputs["q"], inputs["k"], workload.dim, workload.heads
    sequences, lse = sequences_of(workload, inputs), 4 * q.numel() / dim
    tokens, sinks = q.numel() / (dim * heads), sum(m * count for (_, m), count in sequences.items())
    if not sinks:
        return [unbiased]
    share = sinks / tokens
    if direction == FORWARD:
        kernel = find("sink_attention_correction_fwd_kernel", device.architecture, D=dim)
        block_m, block_n = kernel.tile
        rounds = sum(c * rounds_of(m, m, block_m, block_n, workload.causal) for (_, m), c in sequences.items() if m)
        blocks = heads * sum(c * cdiv(m, block_m) for (_, m), c in sequences.items())
        moved = share * (3 * q.nbytes + 2 * k.nbytes + 2 * lse) + bytes_of(inputs, "inter_sink_bias")
        return [unbiased, Launch(kernel, blocks, moved, heads * rounds)]
    delta = find("sink_attention_correction_delta_kernel", device.architecture, D=dim)
    blocks = heads * sum(c * cdiv(m, 16) for (_, m), c in sequences.items())
    copied = Stage(0, 2 * lse)
    correction = sink_pairs(workload, inputs, device, corrects=True)
    return [copied, Launch(delta, blocks, 2 * share * q.nbytes, blocks), unbiased, *correction]


@models("sink_attention", "cuda")
def sink_attention(workload, inputs, direction, device) -> list[Stage | Launch]:
    """What runs on a device without measurements."""
    share = inputs["sink_positions"].shape[1] / workload.length
    shape = Shape("", "bfloat16", workload.dim, workload.length, share, workload.causal, workload.packed)
    fused = ranking(shape, ("flash",), {})[0] == FUSED
    name = "recattn triton" if fused else "recattn correction"
    return MODELS["sink_attention", name, "cuda"](workload, inputs, direction, device)


# --- Plain attention, of refined_attention's long sequences ---


def plain_attention(workload, lengths: Tensor, widths: tuple[int, int], direction, device) -> list[Launch]:
    """The fused kernels without sinks, causal. `widths`: of queries and keys, and of values."""
    qk, v = widths
    rows = workload.heads * float(lengths.sum())
    heads, sequences = workload.heads, Counter(lengths.tolist())

    def launch(name: str, products: tuple[int, int], bytes: float, by_key: bool = False) -> Launch:
        kernel = find(name, device.architecture, D=max(qk, v))
        block_m, block_n = reversed(kernel.tile) if by_key else kernel.tile
        rounds = sum(c * rounds_of(n, n, block_m, block_n, True) for n, c in sequences.items() if n)
        blocks = sum(c * cdiv(n, block_m) for n, c in sequences.items())
        # The table's kernels have values as wide as keys.
        narrower = (products[0] * width_of(qk) + products[1] * width_of(v)) / (sum(products) * kernel.sizes["D"])
        return Launch(kernel, heads * blocks, bytes, narrower * heads * rounds)

    if direction == FORWARD:
        return [launch("sink_attention_fwd_kernel", (1, 1), rows * (4 * qk + 4 * v + 4))]
    dq = launch("sink_attention_bwd_dq_kernel", (2, 1), rows * (6 * qk + 6 * v + 20))
    return [dq, launch("sink_attention_bwd_dkdv_kernel", (2, 2), rows * (6 * qk + 6 * v + 16), by_key=True)]


# --- refined_attention ---


@models("refined_attention", "cuda")
def refined_attention(workload, inputs, direction, device) -> list[Stage | Launch]:
    longest = 128 if device.architecture >= 90 else 64
    if workload.length <= longest or workload.mechanism in ("value", "additive"):
        return short_refined_attention(workload, inputs, direction, device)
    return long_refined_attention(workload, inputs, direction, device)


def short_refined_attention(workload, inputs, direction, device) -> list[Launch]:
    """A program for each block of rows of a batch and head, which holds all of its scores.

    Its loops are over the head dim, and alike; where the compiler has unrolled them, the main loop is the code itself.
    """
    q, n, architecture = inputs["q"], workload.length, device.architecture
    mechanism = "simple" if workload.mechanism == "simple" else "additive"
    bhs = len(q) * workload.heads
    sizes = {"BLOCK_N": min(n, 128), "D": workload.dim}
    weights = bytes_of(inputs, "w_q", "w_k", "w_v")

    def launch(kernel: Kernel, loops: int, bytes: float, launches: int = 1) -> Launch:
        blocks = bhs * cdiv(n, kernel.tile[0])
        again = loops * (cdiv(workload.dim, 32) - 1) if kernel.held > 2 else 0
        return Launch(kernel, blocks, bytes, blocks * (kernel.held + again), launches)

    if direction == FORWARD:
        product, tiles = find("refined_weights_product_kernel", architecture), cdiv(width_of(n), 32) ** 2
        kernel = find("refined_attention_fwd_kernel", architecture, mechanism, **sizes)
        return [
            Launch(product, tiles, weights, tiles * cdiv(inputs["w_q"].shape[1], 64)),
            launch(kernel, 2 if kernel.tile[0] == kernel.tile[1] else 3, 4 * q.nbytes),
        ]
    # As refined_attention.short_backward.PARTIAL_WAVES.
    per_launch = {16: 32, 32: 16, 64: 8, 128: 2}[width_of(min(n, 128))] * device.processors
    chunks, square = cdiv(bhs, per_launch), 4 * width_of(n) ** 2
    stages = stages_of(mechanism, architecture, sizes)
    launches = [launch(kernel, loops, 7 * q.nbytes / len(stages), chunks) for kernel, loops in stages]
    partials = min(bhs, per_launch) * square * (2 if "w_v" in inputs else 1)
    reduce, weights_bwd = (find(f"refined_weights_{name}_kernel", architecture) for name in ("reduce", "bwd"))
    return [*launches, Launch(reduce, 128, partials, 128), Launch(weights_bwd, 16, 3 * weights, 16)]


def stages_of(mechanism: str, architecture: int, sizes: dict[str, int]) -> list[tuple[Kernel, int]]:
    """The launches of a backward, stage 0 or the other three, and the loops of each over the head dim."""
    name = "refined_attention_bwd_kernel"
    found = [find(name, architecture, mechanism, "stage", stage=stage, **sizes) for stage in range(4)]
    whole = found[0].sizes["stage"] == 0 and found[0].tile[1] >= sizes["BLOCK_N"]
    stages = list(zip(found, (5, 3, 2, 1), strict=True))
    return stages[:1] if whole else stages[1:]


def long_refined_attention(workload, inputs, direction, device) -> list[Launch]:
    """The projection x = A [W_q | W_k], then plain attention with its halves as queries and keys."""
    rank, dim = inputs["w_q"].shape[1], workload.dim
    columns = 2 * (rank + -rank % 16)
    lengths = lengths_of(workload, inputs)
    projection = projected(workload, lengths, dim, columns, direction, device)
    attention = plain_attention(workload, lengths, (columns // 2, dim), direction, device)
    return [*projection, *attention] if direction == FORWARD else [*attention, *projection]


def projected(workload, lengths: Tensor, dim: int, columns: int, direction, device) -> list[Stage | Launch]:
    """Linear attention in segments: the states between them, and products with the states and within segments."""
    heads, architecture = workload.heads, device.architecture
    rows = heads * float(lengths.sum())
    segment = max(64, 2 ** math.ceil(math.log2(2 * dim * columns / (dim + columns))))
    segments = [min(segment, n - start) for n in lengths.tolist() for start in range(0, n, segment)]
    within = heads * sum(count * rounds_of(n, n, 64, 64, True) for n, count in Counter(segments).items())
    kept = 2 * heads * (len(segments) - len(lengths)) * dim * columns  # bytes of the states

    def states(read: int, *words: str) -> Launch:
        sizes = {"BLOCK_M": min(dim, 64), "BLOCK_N": min(columns, 64)}
        kernel = find("refined_projection_states_kernel", architecture, *words, **sizes)
        blocks = heads * len(lengths) * cdiv(dim, 64) * cdiv(columns, 64)
        return Launch(kernel, blocks, 2 * rows * read + kept, blocks * cdiv(rows / (heads * len(lengths)), 64))

    def product(e: int, f: int, *words: str) -> Launch:
        """Of rows a, b and c of e, e and f columns; [W_q | W_k] is the one that all batches share."""
        block_f, tiles = min(f, 128), cdiv(f, 128)
        kernel = find("refined_projection_product_kernel", architecture, *words, BLOCK_M=e, BLOCK_N=block_f)
        wider = (e + block_f) / (kernel.tile[0] + min(kernel.tile[1], 128))
        return Launch(
            kernel, cdiv(rows, 64) * tiles, 2 * rows * (2 * dim + columns) + kept, wider * tiles * (within + rows / 64)
        )

    by_queries, by_keys = [], []
    if workload.length > segment:
        by_queries, by_keys = [states(dim)], [states(dim + columns, "reversed")]
    if direction == FORWARD:
        return [*by_queries, product(dim, columns)]
    last = product(dim, columns, "reversed", "summed")
    sums = Stage(0, 8 * 4 * workload.length * columns)  # of dW's partial sums
    return [*by_queries, product(columns, dim), *by_keys, product(columns, dim, "reversed"), last, sums]


# --- wasserstein_attention ---

# The longest sequence and the widest head of which a program holds all tokens, by architecture.
SHORT = {80: (64, 32), 90: (128, 64)}


@models("wasserstein_attention", "cuda")
def wasserstein_attention(workload, inputs, direction, device) -> list[Stage | Launch]:
    lengths, architecture = lengths_of(workload, inputs), device.architecture
    dim, heads, n, one = workload.dim, workload.heads, workload.length, inputs["mean_q"].nbytes
    bhs, rank = len(lengths) * heads, inputs["w_q"].shape[1] // 2 if "w_q" in inputs else None
    width = 2 * (dim if rank is None else rank)
    longest, widest = SHORT[architecture]
    if n <= longest and width <= 2 * widest:
        return [short_wasserstein_attention(bhs, n, dim, one, direction, device)]
    vectors = one / dim * width
    words = () if rank is None else ("refined",)

    def attention(name: str, bytes: float, by_key: bool = False) -> Launch:
        kernel = find(f"wasserstein_attention_{name}_kernel", architecture, W=width, Dv=dim)
        block_m, block_n = reversed(kernel.tile) if by_key else kernel.tile
        rounds = heads * sum(rounds_of(m, m, block_m, block_n, True) for m in lengths.tolist() if m)
        return Launch(kernel, bhs * cdiv(n, block_m), bytes, rounds)

    def vectors_launch() -> Launch:
        kernel = find("wasserstein_attention_vectors_kernel", architecture, *words, W=width)
        tokens = 8192 // width_of(width // 2)
        return Launch(kernel, 2 * bhs, 4 * vectors, 2 * bhs * cdiv(n, tokens))

    forward = [vectors_launch(), attention("fwd", 2 * vectors + 4 * one)]
    backward = [
        attention("bwd_dq", 3 * vectors + 7 * one),
        attention("bwd_dkdv", 3 * vectors + 8 * one, by_key=True),
    ]
    if rank is not None:
        way, moved = ("fwd", 8 * one) if direction == FORWARD else ("bwd", 14 * one)
        factors = find(f"wasserstein_factors_{way}_kernel", architecture, W=2 * dim)
        prepared = Launch(factors, bhs, moved, bhs)
        projection = projected(workload, lengths, 2 * dim + 4, 4 * rank, direction, device)
        return [prepared, *projection, *forward] if direction == FORWARD else [*backward, *projection, prepared]
    return forward if direction == FORWARD else backward


def short_wasserstein_attention(bhs: int, n: int, dim: int, one: float, direction, device) -> Launch:
    """A program for a batch and head, without loops."""
    way, tensors = ("fwd", 8) if direction == FORWARD else ("bwd", 14)
    kernel = find(f"wasserstein_attention_short_{way}_kernel", device.architecture, N=n, D=dim)
    return Launch(kernel, bhs, tensors * one, bhs * kernel.held)


# --- lrea_attention ---


@models("lrea_attention", "cuda")
def lrea_attention(workload, inputs, direction, device) -> list[Stage | Launch]:
    """One pass: a user's product, the middle factor, the other product. The backward: the same of dout, dW, and states.

    Half precision multiplies x's rounding error by W as well.
    """
    targets, keys, w_decomp, lengths = (inputs[name] for name in ("targets", "keys", "w_decomp", "seq_lens"))
    rank, dim, architecture = width_of(workload.rank), workload.dim, device.architecture
    rows, users = len(targets), workload.batch
    scored = float((inputs["target_offsets"].diff() * lengths).sum())
    columns = w_decomp.shape[1]
    x, y = 2 * 2 * rows * rank, 4 * rows * rank
    is_sorted = rows * columns * workload.rank >= max(2**28, 16 * users**2)
    way = "fwd" if direction == FORWARD else "bwd"

    def rows_launch(bytes: float) -> Launch:
        kernel = find("lrea_rows_kernel", architecture, way, r=rank)
        block_m, block_n = kernel.tile
        blocks = cdiv(rows, block_m)
        splits = max(1, min(264 // blocks, columns // block_n // 4)) if blocks < 132 else 1
        rounds = blocks * (scored / rows if is_sorted else columns) / block_n
        return Launch(kernel, blocks * splits, bytes + w_decomp.nbytes, rounds)

    moved = 2 * targets.nbytes + 2 * keys.nbytes + x + y
    if direction == FORWARD:
        sort, blocks = find("lrea_sort_users_kernel", architecture), cdiv(users + 2, 32)
        sorting = [Launch(sort, blocks, 8.0 * users, blocks * cdiv(users, 128))] if is_sorted else []
        return [*sorting, rows_launch(moved)]
    kernel = find("lrea_columns_kernel", architecture, r=rank)
    block_m, block_n = kernel.tile
    blocks = cdiv(columns, block_n)
    splits = max(1, min(264 // blocks, cdiv(rows, block_m) // 4))
    by_columns = Launch(kernel, blocks * splits, x + y + 2 * w_decomp.nbytes, blocks * cdiv(scored / columns, block_m))
    kernel = find("lrea_user_gradients_kernel", architecture, r=rank)
    blocks = users * cdiv(rank, 64) * cdiv(dim, 64)
    by_user = Launch(kernel, blocks, 2 * targets.nbytes + 2 * y + 2 * keys.nbytes, blocks * cdiv(rows / users, 32))
    return [rows_launch(moved + y), by_columns, by_user]


@models("lrea_absorbed_attention", "cuda")
def lrea_absorbed_attention(workload, inputs, direction, device) -> list[Stage]:
    """A kernel of CUDA C++, bound by memory."""
    return [Stage(*absorbed_cost(workload, inputs, direction))]


@models("lrea_compress", "cuda")
def lrea_compress(workload, inputs, direction, device) -> list[Stage | Launch]:
    """dE is written including padding."""
    cost = compress_cost(workload, inputs, FORWARD)
    if direction == FORWARD:
        return [compression(workload, inputs, cost.bytes, device)]
    kernel = find("lrea_compress_bwd_w_comp_kernel", device.architecture, r=workload.rank)
    events, longest = float(inputs["seq_lens"].sum()), inputs["w_comp"].shape[0]
    blocks = cdiv(longest, kernel.tile[0])
    splits = max(1, min(264 // blocks, workload.batch // 4))
    flops = 2 * workload.rank * workload.dim * events
    by_behaviors = Stage(flops, 2 * inputs["behaviors"].nbytes)
    return [by_behaviors, Launch(kernel, blocks * splits, cost.bytes, events / kernel.tile[0])]


@models("lrea_compress_items", "cuda")
def lrea_compress_items(workload, inputs, direction, device) -> list[Launch]:
    return [compression(workload, inputs, compress_items_cost(workload, inputs, direction).bytes, device)]


def compression(workload, inputs, bytes: float, device) -> Launch:
    kernel = find("lrea_compress_fwd_kernel", device.architecture, r=workload.rank)
    splits = max(1, min(264 // workload.batch, int(inputs["seq_lens"].max()) // 256))
    rounds = sum(cdiv(n, 64) for n in inputs["seq_lens"].tolist())
    return Launch(kernel, workload.batch * splits, bytes, rounds)


# --- inter_sink_bias ---


@models("inter_sink_bias", "cuda")
def inter_sink_bias(workload, inputs, direction, device) -> list[Launch]:
    """Forward: a program for 16 rows of a sequence, all heads. Backward: one for a sequence and head."""
    q, m = inputs["q_s"], workload.sinks
    bias = 4 * workload.batch * m**2
    if direction == FORWARD:
        kernel = find("inter_sink_bias_fwd_kernel", device.architecture, BLOCK_N=width_of(m), D=workload.dim)
        blocks = workload.batch * cdiv(m, kernel.tile[0])
        return [Launch(kernel, blocks, 2 * q.nbytes + bias, blocks * workload.heads)]
    kernel = find("inter_sink_bias_bwd_kernel", device.architecture, BLOCK_N=width_of(m), D=workload.dim)
    blocks = workload.batch * workload.heads
    return [Launch(kernel, blocks, 4 * q.nbytes + bias, blocks * cdiv(m, kernel.tile[0]))]


# --- A layer of BERT ---


@models("bert_layer", "cuda")
def bert_layer(workload, inputs, direction, device) -> list[Stage]:
    return cpu_models.bert_layer(workload, inputs, direction, device)

"""What recattn's operators compute and move on a CPU, as stages. On a GPU `gpu_models` has their kernels' launches."""

import torch

from benchmarks.harness.registry import FORWARD, TRAINING
from benchmarks.operators.lrea_attention import absorbed_cost, compress_cost, compress_items_cost, restored_cost
from benchmarks.operators.refined_attention import cost as refined_cost
from benchmarks.operators.wasserstein_attention import cost as wasserstein_cost
from benchmarks.report.stages import Stage, bytes_of, computed, lengths_of, models, softmaxes_of, visible

# --- sink_attention ---


@models("sink_attention", "cpu")
def sink_attention_on_a_cpu(workload, inputs, direction, device):
    """One pass, over the visible pairs: tiles on the diagonal are multiplied as triangles."""
    unbiased, bias = unbiased_attention(workload, inputs, direction, key_block=1), bytes_of(inputs, "inter_sink_bias")
    moved = unbiased.bytes + (bias if direction == FORWARD else 2 * bias)
    return [Stage(unbiased.flops, moved, unbiased.softmaxes)]


def unbiased_attention(workload, inputs, direction, key_block) -> Stage:
    """`key_block`: keys that are processed at a time. A causal attention computes the hidden ones among them, too."""
    q, k, lengths = inputs["q"], inputs["k"], lengths_of(workload, inputs)
    pairs = workload.heads * (computed(lengths, key_block) if workload.causal else visible(lengths, False))
    lse = 4 * q.numel() / workload.dim
    if direction == FORWARD:
        return Stage(4 * workload.dim * pairs, 2 * q.nbytes + 2 * k.nbytes + lse, pairs)
    return Stage(10 * workload.dim * pairs, 4 * q.nbytes + 4 * k.nbytes + lse, pairs, launches=3)


# --- refined_attention ---


@models("refined_attention", "cpu")
def refined_attention_on_a_cpu(workload, inputs, direction, device):
    """The fewest matmuls. The backward recomputes the forward and has two matmuls for each of it."""
    forward = refined_cost(workload, inputs, FORWARD)
    elements = softmaxes_of(workload) * workload.heads * visible(lengths_of(workload, inputs), causal=True)
    if direction == FORWARD:
        return [Stage(forward.flops, forward.bytes, elements)]
    return [Stage(3 * forward.flops, 2 * forward.bytes, elements)]


# --- wasserstein_attention ---


@models("wasserstein_attention", "cpu")
def wasserstein_attention(workload, inputs, direction, device):
    """The backward has five matmuls for the forward's two, as in any attention; refined, it is that of a refinement."""
    forward = wasserstein_cost(workload, inputs, FORWARD)
    pairs = workload.heads * visible(lengths_of(workload, inputs), causal=True)
    if direction == FORWARD:
        return [Stage(forward.flops, forward.bytes, pairs)]
    return [Stage((3 if "w_q" in inputs else 2.5) * forward.flops, 2 * forward.bytes, pairs)]


# --- lrea_attention ---


@models("lrea_absorbed_attention", "cpu")
def lrea_absorbed_attention(workload, inputs, direction, device):
    return [Stage(*absorbed_cost(workload, inputs, direction))]


@models("lrea_compress", "cpu")
def lrea_compress(workload, inputs, direction, device):
    """The backward has a matmul for each gradient, and writes that of the behaviours including padding."""
    forward = compress_cost(workload, inputs, FORWARD)
    if direction == FORWARD:
        return [Stage(*forward)]
    return [Stage(2 * forward.flops, forward.bytes + inputs["behaviors"].nbytes)]


@models("lrea_compress_items", "cpu")
def lrea_compress_items(workload, inputs, direction, device):
    return [Stage(*compress_items_cost(workload, inputs, direction))]


@models("lrea_attention", "cpu")
def lrea_attention(workload, inputs, direction, device):
    """One pass. Of the matmuls with w_decomp the backward has five for the forward's two."""
    forward = restored_cost(workload, inputs, FORWARD)
    if direction == FORWARD:
        return [Stage(*forward)]
    restoring = 4 * workload.rank * float((inputs["target_offsets"].diff() * inputs["seq_lens"]).sum())
    moved = restored_cost(workload, inputs, TRAINING).bytes - forward.bytes
    return [Stage(2 * (forward.flops - restoring) + 2.5 * restoring, moved)]


# --- inter_sink_bias ---


@models("inter_sink_bias", "cpu")
def inter_sink_bias(workload, inputs, direction, device):
    """Over the valid sinks. The backward repeats the forward's matmul and has two more."""
    q, sinks = inputs["q_s"], inputs["sink_mask"].sum(1)  # [B, H, M, d]
    elements = workload.heads * visible(sinks, workload.causal)
    read = 2 * q.nbytes * float(sinks.sum() / inputs["sink_mask"].numel())
    bias = workload.batch * workload.sinks**2 * 4
    if direction == FORWARD:
        return [Stage(2 * workload.dim * elements, read + bias, elements)]
    return [Stage(6 * workload.dim * elements, read + 2 * q.nbytes + bias, elements)]


# --- A layer of BERT ---


@models("bert_layer", "cpu")
def bert_layer(workload, inputs, direction, device):
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
    return [products, between, *sink_attention_on_a_cpu(workload, attention, direction, device)]

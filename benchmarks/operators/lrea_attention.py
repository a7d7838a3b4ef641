"""LREA against chains of batched matmuls: compressing a history, training on it, serving from the stored state.

Serving is also compared with attention over the whole history, which it replaces.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence

import recattn
from benchmarks.data.movielens import ITEMS
from benchmarks.harness import jagged
from benchmarks.harness.goals import AVX2, AVX512, CeilingGoal, LatencyGoal, MemoryGoal, TimeGoal
from benchmarks.harness.registry import COMPILED, EAGER, FORWARD, TRAINING, Cost, Inputs, register
from benchmarks.harness.workloads import (
    CPU,
    CUDA,
    LREA_ABSORBED,
    LREA_COMPRESS,
    LREA_RESTORED,
    Draw,
    LreaWorkload,
    offsets,
)
from recattn import reference
from recattn.ops.lrea_attention import unsupported_reasons

NEGATIVE_SLOPE = 0.01
FACTORED, COMPILED_FACTORED = "eager, factored", "eager, factored, torch.compile"
JAGGED, REPLAYED, FULL_ATTENTION = "jagged bmm", "recattn, graph replay", "SDPA over the history"
HALF, INT8 = "recattn, bfloat16", "recattn, int8 states"


def target_counts(workload: LreaWorkload, draw: Draw) -> Tensor:
    """[U] number of targets of each user."""
    if not workload.ragged:
        return torch.full((workload.batch,), workload.targets)
    return draw.zipf(workload.batch, workload.targets)


def batch_targets(inputs: Inputs) -> Inputs:
    """targets as [U, H, targets, d]: a view if every user has the same number, otherwise padded."""
    lengths = inputs["target_offsets"].diff().tolist()
    users, targets = len(lengths), inputs["targets"]
    even = len(set(lengths)) == 1
    padded = targets.unflatten(0, (users, -1)) if even else pad_sequence(targets.split(lengths), batch_first=True)
    return {**{k: v for k, v in inputs.items() if k != "target_offsets"}, "targets": padded.transpose(1, 2)}


def unbatch_targets(output: Tensor, inputs: Inputs) -> Tensor:
    lengths = inputs["target_offsets"].diff()
    real = torch.arange(output.shape[2], device=output.device) < lengths[:, None]  # [U, targets]
    return output.transpose(1, 2)[real]


# Serving: targets against stored states.


def draw_absorbed(workload: LreaWorkload, draw: Draw) -> Inputs:
    users, rank, dim = workload.batch, workload.rank, workload.dim
    counts = target_counts(workload, draw)
    stored = 4 * users  # the users of a batch are scattered over a larger table
    return {
        "targets": draw.normal(int(counts.sum()), 1, dim),
        "state_keys": draw.normal(stored, 1, rank, dim, std=dim**-0.5),
        "state_values": draw.normal(stored, 1, rank, dim),
        "slots": draw.index(torch.randperm(stored, generator=draw.structure)[:users]),
        "target_offsets": draw.index(offsets(counts)),
    }


def absorbed_cost(workload: LreaWorkload, inputs: Inputs, direction: str) -> Cost:
    targets = inputs["targets"]
    state = inputs["state_keys"][0].nbytes + inputs["state_values"][0].nbytes
    flops = 4 * len(targets) * workload.rank * workload.dim
    return Cost(flops, 2 * targets.nbytes + workload.batch * state)


ABSORBED = register(
    "lrea_absorbed_attention",
    reference.lrea_absorbed_attention,
    draw_absorbed,
    absorbed_cost,
    grads=(),
    workloads=LREA_ABSORBED,
    goals=(
        TimeGoal(workload="256x100", direction=FORWARD, against=(EAGER,), time_ratio=1 / 1.3, capabilities=AVX2),
        TimeGoal(workload="256x100", direction=FORWARD, against=(EAGER,), time_ratio=1 / 1.8, capabilities=AVX512),
        TimeGoal(workload="256x100", direction=FORWARD, against=(COMPILED,), time_ratio=1 / 1.5, capabilities=AVX512),
        TimeGoal(workload="256x100", direction=FORWARD, against=("recattn",), time_ratio=1.0, implementation=HALF),
        TimeGoal(workload="256x100", direction=FORWARD, against=("recattn",), time_ratio=1.0, implementation=INT8),
        TimeGoal(workload="zipf", direction=FORWARD, against=(EAGER,), time_ratio=1 / 3),
        LatencyGoal(workload="gpu_1x1000", direction=FORWARD, device="cuda", milliseconds=0.008, host=True),
        LatencyGoal(
            workload="gpu_1x1000", direction=FORWARD, device="cuda", milliseconds=0.0035, implementation=REPLAYED
        ),
        TimeGoal(workload="gpu_1x1000", direction=FORWARD, device="cuda", against=(COMPILED,), time_ratio=1 / 5),
        CeilingGoal(workload="gpu_1000x200", direction=FORWARD, device="cuda", fraction=0.85),
        TimeGoal(
            workload="gpu_1000x200",
            direction=FORWARD,
            device="cuda",
            against=(EAGER, COMPILED, JAGGED),
            time_ratio=1 / 1.9,
        ),
        TimeGoal(
            workload="gpu_1000x200", direction=FORWARD, device="cuda", against=(FULL_ATTENTION,), time_ratio=1 / 100
        ),
    ),
)
ABSORBED.add_recattn(recattn.lrea_absorbed_attention, partial(unsupported_reasons, op="lrea_absorbed_attention"))


@ABSORBED.implementation(EAGER, prepare=batch_targets, restore=unbatch_targets)
def absorbed_eager(targets, state_keys, state_values, slots):
    scores = F.leaky_relu(targets @ state_keys[slots].mT, NEGATIVE_SLOPE)  # [U, H, targets, r]
    return scores @ state_values[slots]


ABSORBED.add_compiled(
    COMPILED,
    absorbed_eager,
    applies=lambda workload: not workload.ragged,
    prepare=batch_targets,
    restore=unbatch_targets,
    tier="default",
    cpu_tier=None,
)


@ABSORBED.implementation("eager, user by user", applies=lambda workload: workload.ragged)
def absorbed_user_by_user(targets, state_keys, state_values, slots, target_offsets):
    users = zip(targets.split(target_offsets.diff().tolist()), slots.tolist(), strict=True)
    return torch.cat(
        [absorbed_eager(own.transpose(0, 1), state_keys, state_values, slot).transpose(0, 1) for own, slot in users]
    )


@ABSORBED.implementation(
    JAGGED,
    prepare=lambda inputs: {**inputs, "longest": int(inputs["target_offsets"].diff().max())},
    devices=CUDA,
)
def absorbed_jagged(targets, state_keys, state_values, slots, target_offsets, longest):
    """One head. The targets of each user are a row of a jagged tensor."""
    jagged = torch.nested.nested_tensor_from_jagged(targets[:, 0], target_offsets, max_seqlen=longest)  # [U, *, d]
    scores = F.leaky_relu(torch.bmm(jagged, state_keys[slots, 0].mT), NEGATIVE_SLOPE)
    return torch.bmm(scores, state_values[slots, 0]).values().unsqueeze(1)


def capture(inputs: Inputs) -> Inputs:
    """A CUDA graph of the call on these inputs. A service captures one for each batch size."""
    graph = torch.cuda.CUDAGraph()
    recattn.lrea_absorbed_attention(**inputs)  # one-time work stays out of the graph
    with torch.cuda.graph(graph):
        output = recattn.lrea_absorbed_attention(**inputs)
    return {"graph": graph, "output": output}


@ABSORBED.implementation(REPLAYED, prepare=capture, devices=CUDA, ours=True)
def absorbed_replayed(graph, output):
    graph.replay()
    return output


# The same operator on inputs in fewer bits.


def in_bfloat16(inputs: Inputs) -> Inputs:
    return {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}


def bfloat16_reference(**inputs: Tensor) -> Tensor:
    """The operator on inputs rounded to bfloat16: computed in float64 for float64 inputs, otherwise in bfloat16."""
    rounded = in_bfloat16(inputs)
    if inputs["targets"].dtype == torch.float64:
        rounded = {name: x.double() if x.is_floating_point() else x for name, x in rounded.items()}
    return reference.lrea_absorbed_attention(**rounded).to(inputs["targets"].dtype)


def with_int8_states(inputs: Inputs) -> Inputs:
    (keys, key_scales), (values, value_scales) = map(
        recattn.lrea_quantize, (inputs["state_keys"], inputs["state_values"])
    )
    scales = {"key_scales": key_scales, "value_scales": value_scales}
    return {**inputs, "state_keys": keys, "state_values": values, **scales}


def int8_reference(**inputs: Tensor) -> Tensor:
    """The operator on quantised states: exact in float64, otherwise with targets rounded to 16 bits, as for VNNI."""
    targets = inputs["targets"]
    if targets.dtype != torch.float64:
        step = targets.abs().amax(-1, keepdim=True) / 32767
        targets = (targets / step).round() * step
    states = {name: x.float() if name.startswith("state") else x for name, x in inputs.items()}
    return reference.lrea_absorbed_attention(**{**with_int8_states(states), "targets": targets})


for name, prepare, restored, own_reference in (
    (HALF, in_bfloat16, lambda output, inputs: output.float(), bfloat16_reference),
    (INT8, with_int8_states, lambda output, inputs: output, int8_reference),
):
    ABSORBED.implementation(
        name,
        applies=lambda workload: workload.name == "256x100",
        prepare=prepare,
        restore=restored,
        reference=own_reference,
        devices=CPU,
        ours=True,
    )(recattn.lrea_absorbed_attention)


# The attention that serving from a state replaces.


def full_history(inputs: Inputs) -> Inputs:
    """Histories of 10,000 behaviours that repeat the rows of each state. The values do not change SDPA's time."""
    batched = batch_targets(inputs)
    rank = batched["state_keys"].shape[2]
    rows = torch.arange(10_000, device=batched["slots"].device) % rank
    keys, values = (batched[name][batched["slots"]][:, :, rows] for name in ("state_keys", "state_values"))
    return {"q": batched["targets"], "k": keys, "v": values}  # [U, H, targets, d], [U, H, L, d]


def full_reference(**inputs: Tensor) -> Tensor:
    q, k, v = full_history(inputs).values()
    return unbatch_targets((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v, inputs)


@ABSORBED.implementation(
    FULL_ATTENTION,
    applies=lambda workload: workload.length is not None,
    prepare=full_history,
    restore=unbatch_targets,
    reference=full_reference,
    devices=CUDA,
)
def full_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


# Compressing histories.


def draw_histories(workload: LreaWorkload, draw: Draw) -> list[Tensor]:
    if workload.length is None:
        return draw.histories.sample(workload.batch, longest=workload.longest)
    items = torch.randint(1, ITEMS + 1, (workload.batch, workload.length), generator=draw.structure)
    return list(items)


def draw_compress(workload: LreaWorkload, draw: Draw) -> Inputs:
    histories = draw_histories(workload, draw)
    behaviors = draw.embeddings(histories, workload.dim)  # [U, L, d]
    return {
        "behaviors": behaviors,
        "w_comp": draw.normal(behaviors.shape[1], workload.rank, std=behaviors.shape[1] ** -0.5),
        "seq_lens": draw.index([len(history) for history in histories]),
    }


def compress_cost(workload: LreaWorkload, inputs: Inputs, direction: str) -> Cost:
    behaviors, w_comp = inputs["behaviors"], inputs["w_comp"]
    events = int(inputs["seq_lens"].sum())
    flops = 2 * events * workload.rank * workload.dim
    read = events * workload.dim * behaviors.element_size()
    written = workload.batch * workload.rank * workload.dim * behaviors.element_size()
    forward = read + w_comp.nbytes + written
    if direction == FORWARD:
        return Cost(flops, forward)
    # The backward reads behaviours, w_comp and the incoming gradient, and writes both gradients, padding included.
    return Cost(3 * flops, 2 * forward + behaviors.nbytes + w_comp.nbytes)


COMPRESS = register(
    "lrea_compress",
    reference.lrea_compress,
    draw_compress,
    compress_cost,
    grads=("behaviors", "w_comp"),
    workloads=LREA_COMPRESS,
    goals=(
        *(
            TimeGoal(workload=workload, direction=TRAINING, against=(EAGER, COMPILED), time_ratio=1 / 1.5)
            for workload in ("movielens", "movielens_all")
        ),
        *jagged.goals(LREA_COMPRESS),
    ),
)
COMPRESS.add_recattn(recattn.lrea_compress, partial(unsupported_reasons, op="lrea_compress"))
jagged.add_recattn(COMPRESS, recattn.lrea_compress, reference.lrea_compress, ("behaviors",))


def prepare_valid(inputs: Inputs) -> Inputs:
    """Replace the lengths by `valid` [U, 1, L]."""
    inputs = dict(inputs)
    seq_lens = inputs.pop("seq_lens")
    longest = inputs["behaviors"].shape[1] if "behaviors" in inputs else inputs["w_decomp"].shape[1]
    valid = torch.arange(longest, device=seq_lens.device) < seq_lens[:, None]
    return {**inputs, "valid": valid.unsqueeze(1)}


@COMPRESS.implementation(EAGER, prepare=prepare_valid)
def compress_eager(behaviors, w_comp, valid):
    return w_comp.mT @ (behaviors * valid.mT)


COMPRESS.add_compiled(COMPILED, compress_eager, prepare=prepare_valid)


# Compressing histories of item ids, to build states: no gradient.


def draw_compress_items(workload: LreaWorkload, draw: Draw) -> Inputs:
    histories = draw_histories(workload, draw)
    longest = max(map(len, histories))
    return {
        "behaviors": draw.normal(ITEMS + 1, workload.dim),
        "w_comp": draw.normal(longest, workload.rank, std=longest**-0.5),
        "seq_lens": draw.index([len(history) for history in histories]),
        "item_ids": draw.index(pad_sequence(histories, batch_first=True)),
    }


def compress_items_cost(workload: LreaWorkload, inputs: Inputs, direction: str) -> Cost:
    """As for dense behaviours. A table this small stays in the cache, but that is not counted on."""
    row = workload.dim * inputs["behaviors"].element_size()
    events = int(inputs["seq_lens"].sum())
    moved = events * (row + 8) + inputs["w_comp"].nbytes + workload.batch * workload.rank * row
    return Cost(2 * events * workload.rank * workload.dim, moved)


COMPRESS_ITEMS = register(
    "lrea_compress_items",
    reference.lrea_compress,
    draw_compress_items,
    compress_items_cost,
    grads=(),
    workloads=LREA_COMPRESS,
)
COMPRESS_ITEMS.add_recattn(recattn.lrea_compress, partial(unsupported_reasons, op="lrea_compress"))


@COMPRESS_ITEMS.implementation(EAGER)
def compress_items_eager(behaviors, w_comp, seq_lens, item_ids):
    valid = torch.arange(item_ids.shape[1], device=item_ids.device) < seq_lens[:, None]
    return compress_eager(behaviors[item_ids], w_comp, valid.unsqueeze(1))


COMPRESS_ITEMS.add_compiled(COMPILED, compress_items_eager)


# Training: the restored form.


def draw_restored(workload: LreaWorkload, draw: Draw) -> Inputs:
    lengths = [len(history) for history in draw_histories(workload, draw)]
    counts = target_counts(workload, draw)
    rank, dim, longest = workload.rank, workload.dim, max(lengths)
    return {
        "targets": draw.normal(int(counts.sum()), 1, dim),
        "keys": draw.normal(workload.batch, 1, rank, dim),
        "values": draw.normal(workload.batch, 1, rank, dim),
        "w_decomp": draw.normal(rank, longest, std=rank**-0.5),
        "target_offsets": draw.index(offsets(counts)),
        "seq_lens": draw.index(lengths),
    }


def restored_cost(workload: LreaWorkload, inputs: Inputs, direction: str) -> Cost:
    """Cost of the factored form: scores and output in rank r, and two matmuls with w_decomp over the real positions."""
    targets, keys, w_decomp = (inputs[name] for name in ("targets", "keys", "w_decomp"))
    scored = float((inputs["target_offsets"].diff() * inputs["seq_lens"]).sum())
    flops = 4 * workload.rank * (len(targets) * workload.dim + scored)
    forward = 2 * targets.nbytes + 2 * keys.nbytes + w_decomp.nbytes
    if direction == FORWARD:
        return Cost(flops, forward)
    return Cost(3 * flops, 2 * forward + targets.nbytes + 2 * keys.nbytes + w_decomp.nbytes)


RESTORED = register(
    "lrea_attention",
    reference.lrea_attention,
    draw_restored,
    restored_cost,
    grads=("targets", "keys", "values", "w_decomp"),
    workloads=LREA_RESTORED,
    goals=(
        TimeGoal(workload="gpu_16k", direction=TRAINING, device="cuda", against=(FACTORED,), time_ratio=1 / 4),
        TimeGoal(workload="gpu_16k", direction=TRAINING, device="cuda", against=(COMPILED_FACTORED,), time_ratio=1 / 2),
        MemoryGoal(workload="gpu_16k", direction=TRAINING, device="cuda", against=(FACTORED,), memory_ratio=1 / 8),
    ),
)
RESTORED.add_recattn(recattn.lrea_attention, partial(unsupported_reasons, op="lrea_attention"))


def prepare_restored(inputs: Inputs) -> Inputs:
    batched = prepare_valid(batch_targets(inputs))
    return {**batched, "valid": batched["valid"].unsqueeze(1)}  # [U, 1, 1, L]


@RESTORED.implementation(EAGER, prepare=prepare_restored, restore=unbatch_targets)
def restored_eager(targets, keys, values, w_decomp, valid):
    """The equation as written: it restores the history."""
    scale = targets.shape[-1] ** -0.5
    restored_keys, restored_values = w_decomp.mT @ keys, w_decomp.mT @ values  # [U, H, L, d]
    scores = F.leaky_relu(scale * targets @ restored_keys.mT, NEGATIVE_SLOPE) * valid
    return scores @ restored_values


@RESTORED.implementation(FACTORED, prepare=prepare_restored, restore=unbatch_targets)
def factored_eager(targets, keys, values, w_decomp, valid):
    """Nothing of size L·d in memory, but the scores of all positions."""
    compressed_scores = targets.shape[-1] ** -0.5 * targets @ keys.mT  # [U, H, targets, r]
    scores = F.leaky_relu(compressed_scores @ w_decomp, NEGATIVE_SLOPE) * valid
    return (scores @ w_decomp.mT) @ values


RESTORED.add_compiled(COMPILED_FACTORED, factored_eager, prepare=prepare_restored, restore=unbatch_targets)

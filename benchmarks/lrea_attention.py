"""LREA against chains of batched products: compressing a history, training on it, serving from the stored state."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence

import recattn
from benchmarks.goals import TimeGoal
from benchmarks.registry import FORWARD, Cost, Inputs, Operator, register
from benchmarks.workloads import LREA_ABSORBED, LREA_COMPRESS, LREA_RESTORED, Draw, LreaWorkload, offsets
from recattn import reference
from recattn.ops.lrea_attention import availability

NEGATIVE_SLOPE = 0.01


def target_counts(workload: LreaWorkload, draw: Draw) -> Tensor:
    """[U] number of targets of each user."""
    if not workload.ragged:
        return torch.full((workload.batch,), workload.targets)
    return draw.zipf(workload.batch, workload.targets)


def batch_targets(inputs: Inputs) -> Inputs:
    """targets as [U, H, targets, d]: a view where every user has as many, else padded."""
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
    Operator(
        "lrea_absorbed_attention",
        reference.lrea_absorbed_attention,
        draw_absorbed,
        absorbed_cost,
        grads=(),
        baseline="eager",
        workloads=LREA_ABSORBED,
        goals=(
            TimeGoal(workload="256x100", direction=FORWARD, against=("eager",), time_ratio=1 / 1.8),
            TimeGoal(workload="zipf", direction=FORWARD, against=("eager",), time_ratio=1 / 3),
        ),
    )
)
ABSORBED.add_recattn(recattn.lrea_absorbed_attention, partial(availability, op="lrea_absorbed_attention"))


@ABSORBED.implementation("eager", prepare=batch_targets, restore=unbatch_targets)
def absorbed_eager(targets, state_keys, state_values, slots):
    scores = F.leaky_relu(targets @ state_keys[slots].mT, NEGATIVE_SLOPE)  # [U, H, targets, r]
    return scores @ state_values[slots]


@ABSORBED.implementation("eager, user by user", applies=lambda workload: workload.ragged)
def absorbed_user_by_user(targets, state_keys, state_values, slots, target_offsets):
    users = zip(targets.split(target_offsets.diff().tolist()), slots.tolist(), strict=True)
    return torch.cat(
        [absorbed_eager(own.transpose(0, 1), state_keys, state_values, slot).transpose(0, 1) for own, slot in users]
    )


# Compressing histories.


def draw_compress(workload: LreaWorkload, draw: Draw) -> Inputs:
    histories = draw.histories.sample(workload.batch, longest=workload.longest)
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
    Operator(
        "lrea_compress",
        reference.lrea_compress,
        draw_compress,
        compress_cost,
        grads=("behaviors", "w_comp"),
        baseline="eager",
        workloads=LREA_COMPRESS,
    )
)
COMPRESS.add_recattn(recattn.lrea_compress, partial(availability, op="lrea_compress"))


def prepare_valid(inputs: Inputs) -> Inputs:
    """`valid` [U, 1, L] in place of the lengths."""
    inputs = dict(inputs)
    seq_lens = inputs.pop("seq_lens")
    longest = inputs["behaviors"].shape[1] if "behaviors" in inputs else inputs["w_decomp"].shape[1]
    valid = torch.arange(longest, device=seq_lens.device) < seq_lens[:, None]
    return {**inputs, "valid": valid.unsqueeze(1)}


@COMPRESS.implementation("eager", prepare=prepare_valid)
def compress_eager(behaviors, w_comp, valid):
    return w_comp.mT @ (behaviors * valid.mT)


# Training: the restored form.


def draw_restored(workload: LreaWorkload, draw: Draw) -> Inputs:
    histories = draw.histories.sample(workload.batch, longest=workload.longest)
    lengths = [len(history) for history in histories]
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
    """By the factored form: scores and output in rank r, and two products with w_decomp over the real positions."""
    targets, keys, w_decomp = (inputs[name] for name in ("targets", "keys", "w_decomp"))
    scored = float((inputs["target_offsets"].diff() * inputs["seq_lens"]).sum())
    flops = 4 * workload.rank * (len(targets) * workload.dim + scored)
    forward = 2 * targets.nbytes + 2 * keys.nbytes + w_decomp.nbytes
    if direction == FORWARD:
        return Cost(flops, forward)
    return Cost(3 * flops, 2 * forward + targets.nbytes + 2 * keys.nbytes + w_decomp.nbytes)


RESTORED = register(
    Operator(
        "lrea_attention",
        reference.lrea_attention,
        draw_restored,
        restored_cost,
        grads=("targets", "keys", "values", "w_decomp"),
        baseline="eager",
        workloads=LREA_RESTORED,
    )
)
RESTORED.add_recattn(recattn.lrea_attention, partial(availability, op="lrea_attention"))


def prepare_restored(inputs: Inputs) -> Inputs:
    batched = prepare_valid(batch_targets(inputs))
    return {**batched, "valid": batched["valid"].unsqueeze(1)}  # [U, 1, 1, L]


@RESTORED.implementation("eager", prepare=prepare_restored, restore=unbatch_targets)
def restored_eager(targets, keys, values, w_decomp, valid):
    """The history restored, as the equation reads."""
    scale = targets.shape[-1] ** -0.5
    restored_keys, restored_values = w_decomp.mT @ keys, w_decomp.mT @ values  # [U, H, L, d]
    scores = F.leaky_relu(scale * targets @ restored_keys.mT, NEGATIVE_SLOPE) * valid
    return scores @ restored_values


@RESTORED.implementation("eager, factored", prepare=prepare_restored, restore=unbatch_targets)
def factored_eager(targets, keys, values, w_decomp, valid):
    """Nothing of size L·d, but still the scores of all positions."""
    compressed_scores = targets.shape[-1] ** -0.5 * targets @ keys.mT  # [U, H, targets, r]
    scores = F.leaky_relu(compressed_scores @ w_decomp, NEGATIVE_SLOPE) * valid
    return (scores @ w_decomp.mT) @ values

"""A call of every operator, with valid index tensors, by every implementation."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

import recattn
from tests.helpers import sink_inputs, wasserstein_inputs
from tests.helpers.lrea_inputs import draw_absorbed, draw_compress, draw_restored, pack

NO_OPTIONS: dict = {}


class Case(NamedTuple):
    """A call whose index tensors are valid."""

    function: Callable
    draw: Callable[[], dict]
    sizes: dict[str, int]  # as `recattn.validate` takes them
    options: dict = NO_OPTIONS
    gradient: str | None = None  # of this input, which the kernels of serving do not have

    def inputs(self) -> dict:
        torch.manual_seed(0)
        drawn = {name: x for name, x in self.draw().items() if x is not None}
        if self.gradient:
            drawn[self.gradient].requires_grad_()
        return drawn | self.options


def draw_sink() -> dict:
    inputs = sink_inputs.draw(batch=3, heads=2, kv_heads=1, length=7, dim=4, sinks=3)
    inputs["sink_positions"][1, 2] = -1
    return inputs | {"seq_lens": torch.tensor([7, 0, 4])}


def draw_packed() -> dict:
    return sink_inputs.draw_packed([5, 3, 4], [2, 1, 3], heads=2, kv_heads=2, dim=4)


def draw_refined(columns=3) -> dict:
    inputs = {name: torch.randn(3, 2, 7, 4) for name in ("q", "k", "v")}
    inputs |= {name: torch.randn(7, columns) / 10 for name in ("w_q", "w_k")}
    return inputs | {"seq_lens": torch.tensor([7, 0, 4])}


def draw_gaussians(**options) -> dict:
    inputs = wasserstein_inputs.draw(b=3, n=7, dtype=torch.float32, **options)
    return inputs | {"seq_lens": torch.tensor([7, 0, 4])}


def draw_history() -> dict:
    return draw_compress(users=3, length=7, dim=4, rank=3, seq_lens=[7, 0, 4])


def draw_items() -> dict:
    history = draw_history()
    return history | {"behaviors": torch.randn(9, 4), "item_ids": torch.randint(9, (3, 7))}


def draw_packed_history() -> dict:
    return pack(draw_history())


def draw_targets() -> dict:
    return draw_restored(counts=(3, 2, 4), rank=3, dim=4, value_dim=5, length=7, seq_lens=[7, 0, 4])


def draw_state() -> dict:
    return draw_absorbed(counts=(3, 2, 4), rank=3, dim=4, value_dim=5, table=6)


def draw_candidates() -> dict:
    return draw_state() | {"targets": torch.randn(8, 2, 4), "item_ids": torch.randint(8, (9,))}


def draw_absorbable() -> dict:
    return {name: x for name, x in draw_targets().items() if name not in ("targets", "target_offsets")}


sink = functools.partial(Case, recattn.sink_attention, draw_sink, {"seq_len": 7})
packed = functools.partial(Case, recattn.sink_attention, draw_packed, {"num_tokens": 12})
refined = functools.partial(Case, recattn.refined_attention, draw_refined, {"seq_len": 7})
gaussian = functools.partial(Case, recattn.wasserstein_attention, draw_gaussians, {"seq_len": 7})
compress = functools.partial(Case, recattn.lrea_compress, draw_history, {"seq_len": 7})
items = functools.partial(Case, recattn.lrea_compress, draw_items, {"seq_len": 7, "num_items": 9})
restored = functools.partial(Case, recattn.lrea_attention, draw_targets, {"seq_len": 7, "num_targets": 9})
absorbed = functools.partial(Case, recattn.lrea_absorbed_attention, draw_state, {"num_slots": 6, "num_targets": 9})
by_item = functools.partial(
    Case, recattn.lrea_absorbed_attention, draw_candidates, {"num_slots": 6, "num_targets": 9, "num_items": 8}
)
DROPOUT, REFERENCE, TRITON = {"dropout_p": 0.5}, {"impl": "reference"}, {"impl": "triton"}
CASES = {
    "sink": sink(),
    "sink dropout": sink(DROPOUT),
    "sink reference": sink(REFERENCE),
    "sink triton": sink(TRITON),
    "packed": packed(),
    "packed dropout": packed(DROPOUT),
    "packed triton": packed(TRITON),
    "refined": refined(),
    "refined dropout": refined(DROPOUT),
    "refined triton": refined(TRITON),
    "gaussian": gaussian(),
    "gaussian dropout": gaussian(DROPOUT),
    "gaussian triton": gaussian(TRITON),
    "compress": compress(),
    "compress reference": compress(REFERENCE),
    "compress triton": compress(TRITON),
    "compress packed": Case(recattn.lrea_compress, draw_packed_history, {"num_tokens": 11}),
    "items": items(),
    "items gradient": items(gradient="behaviors"),
    "items triton": items(TRITON),
    "restored": restored(),
    "restored reference": restored(REFERENCE),
    "restored triton": restored(TRITON),
    "absorb": Case(recattn.lrea_absorb, draw_absorbable, {"seq_len": 7}),
    "absorbed": absorbed(),
    "absorbed gradient": absorbed(gradient="state_keys"),
    "by item": by_item(),
    "by item gradient": by_item(gradient="targets"),
}
INDICES = ("sink_positions", "seq_lens", "seq_starts", "cu_seqlens", "target_offsets", "slots", "item_ids")

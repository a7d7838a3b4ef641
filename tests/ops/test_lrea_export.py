"""lrea_absorbed_attention in a ranking service: exported, compiled to a file, and run from it without recattn."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

import recattn
from recattn import reference
from recattn._extension import MISSING

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif("cpu" in MISSING, reason=MISSING.get("cpu", ""))),
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif("cuda" in MISSING, reason=MISSING.get("cuda", ""))]
    ),
]
KERNELS = Path(recattn.__file__).parent


class Ranker(nn.Module):
    """Scores of candidates, read by item id, for users whose states are in int8 tables.

    For two batches of users: the call of the first is to have valid slots, that of the second counts invalid ones.
    """

    def forward(self, items, keys, values, key_scales, value_scales, batch, counted_batch, invalid):
        return tuple(
            (
                recattn.lrea_absorbed_attention(
                    items,
                    keys,
                    values,
                    slots,
                    target_offsets,
                    item_ids=item_ids,
                    key_scales=key_scales,
                    value_scales=value_scales,
                    invalid=counter,
                )
                * items[item_ids]
            ).sum((1, 2))
            for (slots, target_offsets, item_ids), counter in ((batch, None), (counted_batch, invalid))
        )


def draw_tables(device: str) -> tuple[torch.Tensor, ...]:
    keys, key_scales = recattn.lrea_quantize(torch.randn(16, 1, 8, 32))
    values, value_scales = recattn.lrea_quantize(torch.randn(16, 1, 8, 32))
    return tuple(x.to(device) for x in (torch.randn(50, 1, 32), keys, values, key_scales, value_scales))


def draw_batch(counts: list[int], device: str) -> tuple[torch.Tensor, ...]:
    """slots, target_offsets and item_ids."""
    drawn = torch.randint(16, (len(counts),)), torch.tensor([0, *counts]).cumsum(0), torch.randint(50, (sum(counts),))
    return tuple(x.to(device) for x in drawn)


def expected_scores(items, keys, values, key_scales, value_scales, batch):
    keys, values = keys * key_scales[..., None], values * value_scales[..., None]
    slots, target_offsets, item_ids = batch
    targets = items[item_ids]
    return (reference.lrea_absorbed_attention(targets, keys, values, slots, target_offsets) * targets).sum((1, 2))


RUN_FROM_FILE = """
import sys, torch
for library in sys.argv[4:]:
    torch.ops.load_library(library)
run, calls = torch._inductor.aoti_load_package(sys.argv[1]), torch.load(sys.argv[2])
torch.save(([run(*call) for call in calls], [call[-1] for call in calls]), sys.argv[3])
assert "recattn" not in sys.modules
"""


@pytest.mark.parametrize("device", DEVICES)
def test_exports_compiles_and_runs_from_a_file(device, tmp_path):
    per_user = ({0: Dim.DYNAMIC},) * 3
    shapes = (None, None, None, None, None, per_user, per_user, None)
    tables = draw_tables(device)

    def draw_call(counts: list[int], counted: list[int]) -> tuple:
        counter = torch.zeros(1, dtype=torch.int64, device=device)
        return (*tables, draw_batch(counts, device), draw_batch(counted, device), counter)

    with torch.no_grad():
        exported = torch.export.export(Ranker(), draw_call([4, 0, 9], [3, 2]), dynamic_shapes=shapes)
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "ranker.pt2"))
    calls = [draw_call([4, 0, 9], [2, 0, 5]), draw_call([1, 30, 2, 0, 5], [1, 30, 2, 0, 5])]
    expected = [[expected_scores(*tables, batch) for batch in call[5:7]] for call in calls]
    calls[1][6][0][1] = 16  # no slot: user 1 of the counted batch has targets 1 .. 31
    expected[1][1][1:31] = 0
    torch.save(calls, tmp_path / "calls")
    libraries = [str(path) for path in sorted(KERNELS.glob("_C*.so"))]
    command = [sys.executable, "-c", RUN_FROM_FILE, package, str(tmp_path / "calls"), str(tmp_path / "scores")]
    subprocess.run([*command, *libraries], check=True)
    outputs, counters = torch.load(tmp_path / "scores")
    for of_call, right_of_call in zip(outputs, expected, strict=True):
        for scores, right in zip(of_call, right_of_call, strict=True):
            # An int8 state is as exact as its steps; what is tested here is the way through the file.
            torch.testing.assert_close(scores, right, rtol=0, atol=0.02 * right.abs().max().item())
    assert [counter.item() for counter in counters] == [0, 1]


# --- States made in a graph ---


def draw_histories(users=3, length=20):
    return torch.randn(users, length, 8), torch.randint(length + 1, (users,))


@pytest.fixture
def lrea():
    return recattn.nn.LREA(8, 20, 4, num_heads=2, dtype=torch.float64).double()


def equal_states(actual, expected) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_export_state_is_one_graph_for_all_lengths(lrea):
    torch._dynamo.reset()
    compiled = torch.compile(lrea.export_state, fullgraph=True, backend="aot_eager")
    for stance in ("default", "fail_on_recompile", "fail_on_recompile"):
        behaviors, seq_lens = draw_histories()
        with torch.compiler.set_stance(stance):
            state = compiled(behaviors.double(), seq_lens)
        assert equal_states(state, lrea.export_state(behaviors.double(), seq_lens))


def test_export_state_exports(lrea):
    class Export(nn.Module):
        def __init__(self):
            super().__init__()
            self.lrea = lrea

        def forward(self, behaviors, seq_lens):
            return self.lrea.export_state(behaviors, seq_lens)

    users = Dim("users", min=2)
    example = draw_histories()[0].double(), draw_histories()[1]
    exported = torch.export.export(Export(), example, dynamic_shapes=({0: users}, {0: users})).module()
    for count in (3, 7):
        behaviors, seq_lens = draw_histories(count)
        assert equal_states(exported(behaviors.double(), seq_lens), lrea.export_state(behaviors.double(), seq_lens))

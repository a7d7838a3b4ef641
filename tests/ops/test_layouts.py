"""The fast check of a call's tensors: it lets nothing through that the slow one, which says what is wrong, refuses."""

import pytest
import torch

from recattn import _check as check

pytest.importorskip("recattn._host")

LAYOUTS = check.Layouts(
    q=(check.FLOATING, "B Hq N D"),
    k=(check.SAME, "B Hkv N D"),
    w=(check.SAME, "[Hq] N 2"),
    bias=(check.FLOATING, "B 1|Hq M M"),
    mask=(check.BOOL, "B M?"),
    offsets=(check.INTEGER, "B+1?"),
)
DIMS = {"q": (2, 4, 3, 5), "k": (2, 2, 3, 5), "w": (3, 2), "bias": (2, 1, 6, 6), "mask": (2, 6), "offsets": (3,)}
DTYPES = {"bias": torch.float64, "mask": torch.bool, "offsets": torch.int32}


def tensors(**changes) -> list:
    made = {name: torch.zeros(dims, dtype=DTYPES.get(name, torch.float32)) for name, dims in DIMS.items()}
    return list({**made, **changes}.values())


class Subclass(torch.Tensor):
    pass


def test_sizes():
    assert LAYOUTS.symbols == ["B", "Hq", "N", "D", "Hkv", "M"]
    assert LAYOUTS.sizes(*tensors()) == (2, 4, 3, 5, 2, 6)
    assert LAYOUTS.sizes(*tensors(w=torch.zeros(4, 3, 2), bias=torch.zeros(2, 4, 6, 6))) == (2, 4, 3, 5, 2, 6)
    assert LAYOUTS.sizes(*tensors(mask=None, offsets=None)) == (2, 4, 3, 5, 2, 6)
    assert LAYOUTS.sizes(*tensors(q=torch.nn.Parameter(torch.zeros(DIMS["q"])))) == (2, 4, 3, 5, 2, 6)
    assert LAYOUTS.sizes(*(None if x is None else x.to("meta") for x in tensors())) == (2, 4, 3, 5, 2, 6)


@pytest.mark.parametrize(
    "changes",
    [
        {"q": None},
        {"k": None},
        {"bias": None},
        {"q": 1.0},
        {"mask": "a mask"},
        {"q": torch.zeros(2, 4, 3)},
        {"k": torch.zeros(2, 2, 4, 5)},
        {"k": torch.zeros(DIMS["k"], dtype=torch.float64)},
        {"k": torch.zeros(DIMS["k"], device="meta")},
        {"w": torch.zeros(3, 1)},
        {"w": torch.zeros(5, 3, 2)},
        {"w": torch.zeros(1, 4, 3, 2)},
        {"bias": torch.zeros(2, 2, 6, 6)},
        {"bias": torch.zeros(2, 1, 6, 5)},
        {"bias": torch.zeros(2, 1, 6, 6, dtype=torch.int64)},
        {"mask": torch.zeros(2, 6)},
        {"offsets": torch.zeros(2, dtype=torch.int64)},
        {"offsets": torch.zeros(0, dtype=torch.int64)},
        {"offsets": torch.zeros(3, dtype=torch.int16)},
        {"q": torch.zeros(DIMS["q"]).to_sparse()},
        {"q": torch.nested.nested_tensor([torch.zeros(4, 3, 5)] * 2)},
        {"q": torch.zeros(DIMS["q"]).as_subclass(Subclass)},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_does_not_fit(changes):
    assert LAYOUTS.sizes(*tensors(**changes)) is None


def test_under_compile_the_slow_check_runs():
    @torch.compile(fullgraph=True, backend="eager")
    def sizes(*given):
        return 1 if LAYOUTS.sizes(*given) is None else 2

    assert sizes(*tensors()) == 1

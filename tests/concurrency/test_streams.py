"""Every operator on several CUDA streams at once: the results are one stream's, bit for bit."""

import pytest
import torch

from tests.concurrency.test_threads import call, same
from tests.helpers.operator_cases import CASES


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "dropout_p" not in case.options])
def test_several_streams_at_once_give_one_streams_bits(name):
    case = CASES[name]
    expected = call(case, "cuda")
    torch.cuda.synchronize()
    results = []
    for stream in [torch.cuda.Stream() for _ in range(4)] * 5:
        with torch.cuda.stream(stream):
            results.append(call(case, "cuda"))
    torch.cuda.synchronize()
    assert all(same(result, expected) for result in results)

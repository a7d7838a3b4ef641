"""Without the compiled CPU kernels the first call that they would have served warns, once."""

import warnings

import pytest
import torch

import recattn
from recattn import _dispatch
from recattn._extension import MISSING, reinstall_command

REASON = f"recattn was installed without its cpu kernels; {reinstall_command('cpu')}"
Q = torch.randn(1, 2, 5, 4)
W = torch.randn(5, 3)
SINKS = torch.tensor([[1, 3]]), torch.zeros(1, 1, 2, 2)


@pytest.fixture(autouse=True)
def first_call(monkeypatch):
    monkeypatch.setattr(_dispatch, "_has_warned", False)


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setitem(MISSING, "cpu", REASON)


def warnings_of(*calls) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in calls:
            call()
    return [warning for warning in caught if "compiled kernels" in str(warning.message)]


def attend(**options):
    return recattn.sink_attention(Q, Q, Q, *SINKS, **options)


def refine(**options):
    return recattn.refined_attention(Q, Q, Q, W, W, **options)


def test_the_first_call_warns(without_kernels):
    (warning,) = warnings_of(attend, refine, attend)
    assert warning.category is RuntimeWarning and warning.filename == __file__
    assert str(warning.message) == (
        f"recattn runs without compiled kernels, and slower: sink_attention by impl='reference'. {REASON}"
    )


def test_it_says_what_runs(without_kernels):
    (warning,) = warnings_of(refine)
    assert "refined_attention by impl='chunked'" in str(warning.message)
    assert refine().equal(refine(impl="chunked"))


def test_calls_that_no_kernel_would_have_served_do_not_warn(without_kernels):
    x = Q.double()
    float64 = lambda: recattn.sink_attention(x, x, x, *SINKS)  # noqa: E731
    assert not warnings_of(lambda: attend(impl="reference"), lambda: refine(impl="chunked"), float64)
    assert len(warnings_of(attend)) == 1


@pytest.mark.skipif("cpu" in MISSING, reason="needs the compiled extension")
def test_with_the_kernels_nothing_warns():
    assert not warnings_of(attend, refine)


def test_it_warns_under_torch_compile_and_breaks_no_graph(without_kernels):
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    assert len(warnings_of(compiled, compiled)) == 1


def test_the_documented_filter_silences_it(without_kernels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "recattn runs without compiled kernels")
        attend()

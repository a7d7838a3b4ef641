"""The types of the public functions: py.typed, and literals that are what the functions take."""

from importlib.resources import files
from typing import get_args

import pytest

from recattn import _typing
from recattn._extension import MISSING
from recattn.nn.sink_tokens import TABLES
from recattn.nn.sink_training import STAGES
from recattn.ops import UNSUPPORTED_REASONS
from recattn.ops.backends import BACKENDS
from tests.packaging import typed_calls

IMPLEMENTATIONS = {
    "sink_attention": _typing.SinkAttentionImpl,
    "inter_sink_bias": _typing.InterSinkBiasImpl,
    "refined_attention": _typing.RefinedAttentionImpl,
    "wasserstein_attention": _typing.WassersteinAttentionImpl,
    "lrea_compress": _typing.LreaImpl,
    "lrea_attention": _typing.LreaImpl,
    "lrea_absorbed_attention": _typing.LreaAbsorbedImpl,
}


@pytest.mark.parametrize("op", UNSUPPORTED_REASONS)
def test_impl_lists_the_implementations(op):
    backends = {f"correction:{name}" for name in BACKENDS} if op == "sink_attention" else set()
    assert {*get_args(IMPLEMENTATIONS[op])} == UNSUPPORTED_REASONS[op]("cuda").keys() | backends


def test_choices_are_those_of_the_checks():
    assert {*get_args(_typing.Signal)} == TABLES.keys()
    assert get_args(_typing.Stage) == STAGES


def test_the_package_says_that_it_is_typed():
    assert files("recattn").joinpath("py.typed").is_file()


@pytest.mark.parametrize("call", [typed_calls.call_functions, typed_calls.call_modules, typed_calls.patch_a_model])
def test_typed_calls_run(call):
    call()


@pytest.mark.skipif("cpu" in MISSING, reason="needs the compiled extension")
def test_typed_serving_runs():
    typed_calls.serve()

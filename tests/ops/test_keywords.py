"""An unknown keyword is answered by naming ours."""

import re

import pytest
import torch

import recattn
from recattn.functional import _keywords


@pytest.mark.parametrize("keyword", _keywords._FOREIGN)
def test_foreign_keywords(keyword):
    whose, ours, _ = _keywords._FOREIGN[keyword]
    x = torch.randn(1, 1, 4, 4)
    expected = rf"^inter_sink_bias\(\) has no keyword {keyword} \({re.escape(whose)}\): \S"
    with pytest.raises(TypeError, match=expected) as error:
        recattn.inter_sink_bias(x, x, **{keyword: None})
    has_it = ours in ("causal", "scale", "dropout_p", "impl")
    assert (f": use {ours}" in str(error.value)) == has_it


def test_misspelt_keywords():
    x = torch.randn(1, 1, 4, 4)
    with pytest.raises(TypeError, match=r"no keyword casual: did you mean causal\?"):
        recattn.inter_sink_bias(x, x, casual=True)
    with pytest.raises(TypeError, match="no keyword blue: it has q_s, k_s, "):
        recattn.inter_sink_bias(x, x, blue=True)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        recattn.inter_sink_bias(x)

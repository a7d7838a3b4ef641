"""An unknown keyword is answered by naming ours."""

import re

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

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


# --- Scripts of users of other libraries, changed only as our messages say ---


def migrated(keywords: dict, values: dict) -> dict:
    """The keywords with which sink_attention takes the call, after renaming or leaving out what its errors name.

    `values` has those that a message leaves to the user, such as what an attn_bias was.
    """
    x = torch.randn(1, 1, 1, 1)
    for _ in range(10):
        try:
            recattn.sink_attention(x, x, x, **keywords)
        except TypeError as error:
            unknown = re.search(r"no keyword (\w+)", str(error))[1]
            named = re.search(r": use (\w+)", str(error))
            value = keywords.pop(unknown)
            assert "leave it out" in str(error) or named or all(f"{name}=" in str(error) for name in values)
            keywords |= {named[1]: value} if named else {} if "leave it out" in str(error) else values
        except ValueError:  # the keywords are right, and x does not fit the others
            return keywords
        else:
            return keywords
    raise AssertionError(keywords)


def test_a_script_for_sdpa():
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    keywords = {"is_causal": True, "enable_gqa": True, "scale": 0.3, "dropout_p": 0.0}
    expected = F.scaled_dot_product_attention(q, k, v, **keywords)
    torch.testing.assert_close(recattn.sink_attention(q, k, v, **migrated(keywords, {})), expected)


def test_a_script_for_flash_attn():
    q, k, v = (torch.randn(7, 2, 8) for _ in range(3))
    offsets = torch.tensor([0, 3, 7], dtype=torch.int32)
    keywords = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": 4, "max_seqlen_k": 4}
    keywords |= {"dropout_p": 0.0, "softmax_scale": 0.3, "causal": True, "deterministic": True}
    out = recattn.sink_attention(q, k, v, **migrated(keywords, {}))
    for start, stop in ((0, 3), (3, 7)):
        q_b, k_b, v_b = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        expected = F.scaled_dot_product_attention(q_b, k_b, v_b, is_causal=True, scale=0.3)
        torch.testing.assert_close(out[start:stop].transpose(0, 1), expected)


def test_a_script_for_xformers():
    q, k, v = (torch.randn(2, 9, 4, 8) for _ in range(3))  # [B, N, H, D]
    keywords = {"attn_bias": "LowerTriangularMask()", "p": 0.0, "scale": None}
    keywords = migrated(keywords, {"causal": True})
    out = recattn.sink_attention(*(x.transpose(1, 2) for x in (q, k, v)), **keywords).transpose(1, 2)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))

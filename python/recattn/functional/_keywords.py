"""Keywords that people know from other attention functions, answered by naming ours."""

import difflib
import functools
import inspect
from collections.abc import Callable, Collection
from typing import TypeVar, cast

_Function = TypeVar("_Function", bound=Callable)

_SDPA, _FLASH_ATTN, _XFORMERS = "scaled_dot_product_attention", "flash-attn", "xFormers"
_MULTIHEAD, _FLEX = "nn.MultiheadAttention", "FlexAttention"
_TOKENS_FIRST = "its tensors are [B, N, H, D], ours [B, H, N, D]: transpose(1, 2)"
_PADDING = "give the padding by seq_lens (the tokens of each sequence), or no padding at all by cu_seqlens"
_BIAS = f"a causal mask is causal=True; {_PADDING}; a bias between sinks is inter_sink_bias of sink_attention"

# The keyword: whose it is, our keyword where there is one that means the same, and what else to know.
_FOREIGN: dict[str, tuple[str, str | None, str | None]] = {
    "query": (_SDPA, "q", None),
    "key": (_SDPA, "k", None),
    "value": (_SDPA, "v", None),
    "is_causal": (_SDPA, "causal", None),
    "attn_mask": (_SDPA, None, _BIAS),
    "enable_gqa": (_SDPA, None, "leave it out: sink_attention takes fewer key heads than query heads as they are"),
    "softmax_scale": (_FLASH_ATTN, "scale", _TOKENS_FIRST),
    "cu_seqlens_q": (_FLASH_ATTN, "cu_seqlens", "one for queries and keys, which are the same tokens"),
    "cu_seqlens_k": (_FLASH_ATTN, "cu_seqlens", "one for queries and keys, which are the same tokens"),
    "max_seqlen_q": (_FLASH_ATTN, "max_seqlen", "one for queries and keys, which are the same tokens"),
    "max_seqlen_k": (_FLASH_ATTN, "max_seqlen", "one for queries and keys, which are the same tokens"),
    "return_attn_probs": (_FLASH_ATTN, "return_lse", None),
    "return_softmax_lse": (_FLASH_ATTN, "return_lse", None),
    "deterministic": (_FLASH_ATTN, None, "leave it out: every kernel is deterministic"),
    "window_size": (_FLASH_ATTN, None, "there is no sliding window"),
    "alibi_slopes": (_FLASH_ATTN, None, "there is no ALiBi"),
    "softcap": (_FLASH_ATTN, None, "there is no cap of the scores"),
    "attn_bias": (_XFORMERS, None, f"a LowerTriangularMask is causal=True, a BlockDiagonalMask cu_seqlens; {_BIAS}"),
    "p": (_XFORMERS, "dropout_p", _TOKENS_FIRST),
    "op": (_XFORMERS, "impl", None),
    "score_mod": (_FLEX, None, _BIAS),
    "block_mask": (_FLEX, None, _BIAS),
    "sm_scale": ("Triton's tutorial", "scale", None),
    "dropout": (_MULTIHEAD, "dropout_p", None),
    "key_padding_mask": (_MULTIHEAD, None, f"{_PADDING}; the modules of recattn.nn take the mask itself"),
    "need_weights": (_MULTIHEAD, None, "the modules of recattn.nn return the weights"),
    "attention_mask": ("transformers", None, _PADDING),
}


# Where the modules answer something else.
_FOREIGN_TO_MODULES: dict[str, tuple[str, str | None, str | None]] = {
    "causal": ("the functions", "is_causal", None),
    "dropout_p": (_SDPA, "dropout", None),
    "scale": (_SDPA, None, "the scale is 1/√D"),
    "softmax_scale": (_FLASH_ATTN, None, "the scale is 1/√D"),
    "attention_mask": ("transformers", "key_padding_mask", "True is padding: attention_mask == 0"),
    "attn_bias": (_XFORMERS, None, "a causal mask is is_causal=True; padding is key_padding_mask"),
    "kdim": (_MULTIHEAD, None, "keys have embed_dim columns"),
    "vdim": (_MULTIHEAD, None, "values have embed_dim columns"),
    "add_bias_kv": (_MULTIHEAD, None, "there is no such key"),
    "add_zero_attn": (_MULTIHEAD, None, "there is no such key"),
}


def explain_keywords(function: _Function) -> _Function:
    """Decorator: the TypeError of an unknown keyword names ours."""
    parameters = inspect.signature(function).parameters

    @functools.wraps(function)
    def explained(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            name = type(args[0]).__name__ if function.__name__ == "__init__" else function.__qualname__
            raise explanation(name, parameters, kwargs) or error from None

    return cast("_Function", explained)


def explanation(name: str, parameters: Collection[str], given: Collection[str]) -> TypeError | None:
    """The error of the first given keyword that is no parameter of the function `name`; None: there is none."""
    unknown = next((keyword for keyword in given if keyword not in parameters), None)
    if unknown is None:
        return None
    foreign = _FOREIGN | _FOREIGN_TO_MODULES if "self" in parameters else _FOREIGN
    parameters = [parameter for parameter in parameters if parameter != "self"]
    whose, ours, remark = foreign.get(unknown, (None, None, None))
    close = difflib.get_close_matches(unknown, parameters, 1)
    if ours in parameters:
        answer = f"use {ours}"
    elif remark is not None:
        answer, remark = remark, None
    elif whose is None and close:
        answer = f"did you mean {close[0]}?"
    else:
        answer = f"it has {', '.join(parameters)}"
    known_from, more = f" ({whose})" if whose else "", f"; {remark}" if remark else ""
    return TypeError(f"{name}() has no keyword {unknown}{known_from}: {answer}{more}")

"""Models that pass no keyword arguments on: their sinks and biases travel with the attention mask.

Whatever such a model does to its mask is replaced on the instance, so that the mask reaches each attention as it came.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from recattn.integrations.transformers.attention import Sinks, sink_attention_forward
from recattn.integrations.transformers.generations._adapter import Adapter

_ABSENT = object()


class SinkMask(NamedTuple):
    """What an attention gets in the place of its mask."""

    mask: Tensor | None  # [B, N], or [B, 1, Nq, Nk]: bool or additive
    sinks: Sinks | None
    bias: Tensor | None = None  # of this attention


def as_sink_mask(mask: SinkMask | Tensor | None) -> SinkMask:
    """A model that shares the config of one with sinks gets the same attention function, with a plain mask."""
    return mask if isinstance(mask, SinkMask) else SinkMask(mask, None)


class MaskAdapter(Adapter):
    """Sinks and bias travel with the attention mask."""

    # The argument of the attention module that is its mask.
    attention_mask = "attention_mask"

    def replacements(self, base: nn.Module, attentions: list[nn.Module]) -> list[tuple[nn.Module, str, object]]:
        """(module, attribute, value): what of the instance is replaced until `restore`."""
        raise NotImplementedError

    def enable(self, model: nn.Module, attentions: list[nn.Module]) -> Callable[[], None]:
        reset_config = super().enable(model, attentions)
        replaced = [
            (module, name, vars(module).get(name, _ABSENT), value)
            for module, name, value in self.replacements(model.base_model, attentions)
        ]
        for module, name, _, value in replaced:
            setattr(module, name, value)

        def disable() -> None:
            for module, name, own, _ in replaced:
                delattr(module, name) if own is _ABSENT else setattr(module, name, own)
            reset_config()

        return disable

    def pass_sinks(self, arguments: dict[str, object], sinks: Sinks) -> None:
        mask = arguments.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 3:  # [B, Nq, Nk], 0 where a key is hidden
            mask = mask[:, None] != 0
        arguments["attention_mask"] = SinkMask(mask, sinks)

    def read_sinks(self, arguments: dict[str, object]) -> Sinks | None:
        return as_sink_mask(arguments[self.attention_mask]).sinks

    def pass_bias(self, arguments: dict[str, object], bias: Tensor) -> None:
        arguments[self.attention_mask] = arguments[self.attention_mask]._replace(bias=bias)


def sink_mask_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: SinkMask | Tensor | None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """`sink_attention_forward` for an attention whose sinks and bias come with its mask."""
    mask, sinks, bias = as_sink_mask(attention_mask)
    if mask is not None and mask.dim() == 4:
        mask = mask[..., : key.shape[2]]  # transformers' may have a column more
    return sink_attention_forward(module, query, key, value, mask, sinks=sinks, inter_sink_bias=bias, **kwargs)

"""What is attached to a model: it reads the sinks of a batch, computes the bias of a layer, loads old scales."""

import functools
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor

from recattn._check import expect, expect_index
from recattn.functional.validation import assert_on_device, checked_indices, expect_values, values_are_checked
from recattn.integrations.transformers.architectures import BIAS, is_causal
from recattn.integrations.transformers.attention import NAME, Sinks
from recattn.integrations.transformers.generations._adapter import Adapter
from recattn.nn._masks import are_windows, find_windows


class SinkReader:
    """The forward of a base model with sinks: finds them and passes them to each attention.

    It replaces the forward of the instance: sentence-transformers calls that directly, past the hooks of the model.
    """

    def __init__(self, adapter: Adapter, base: Any, attentions: list[Any], settings: dict[str, Any]) -> None:
        self.adapter, self.names, self.attentions = adapter, _argument_names(base), attentions
        self.base, self.own_forward = base, vars(base).get("forward")
        self.sink_token_id, self.max_sinks = settings["sink_token_id"], settings["max_sinks"]
        self.padding_side = settings["padding_side"]
        self.warned = False

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the base model's forward: the libraries that read it filter their arguments by it."""
        return inspect.signature(functools.partial(type(self.base).forward, self.base))

    def install(self) -> None:
        self.base.forward = self

    def remove(self) -> None:
        if self.own_forward is None:
            del self.base.forward
        else:
            self.base.forward = self.own_forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        base = self.base
        implementation = base.config._attn_implementation
        expect(implementation == NAME, "the attention of the model", f"{NAME!r} until restore()", repr(implementation))
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        self.adapter.pass_sinks(arguments, self.read(arguments, arguments.pop("sink_positions", None)))
        if base.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._warn_of_frozen_biases()
        return type(base).forward(base, **arguments) if self.own_forward is None else self.own_forward(**arguments)

    def read(self, arguments: dict[str, Any], positions: Tensor | None) -> Sinks:
        """The sinks and the padding of a call of the base model with these arguments."""
        mask, input_ids, embeddings, cache = (
            arguments.get(name) for name in ("attention_mask", "input_ids", "inputs_embeds", "past_key_values")
        )
        cache = arguments.get("cache") if cache is None else cache  # its name from 5.24
        tokens = embeddings if input_ids is None else input_ids
        if tokens is None:  # transformers raises for it
            return Sinks(None, None, needs_mask=True)
        if cache is not None and self._follows_prompt(cache.get_seq_length(), tokens.shape[1], input_ids, positions):
            return Sinks(None, None, needs_mask=True)
        visible = _read_valid_tokens(mask)
        positions = self._find_positions(input_ids, visible) if positions is None else self._checked(positions, tokens)
        valid = positions >= 0
        if visible is not None:
            valid = valid & visible.gather(1, positions.long().clamp(min=0))
        if mask is None and cache is None:
            self._expect_unpacked(arguments.get("position_ids"), valid)
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
            return Sinks(positions, valid, *self._read_padding(visible))
        return Sinks(positions, valid, needs_mask=True)

    def _is_sink(self, input_ids: Tensor | None) -> Tensor | None:
        """Whether each token is a sink, [B, N]; None if unknown."""
        return None if self.sink_token_id is None or input_ids is None else input_ids == self.sink_token_id

    @staticmethod
    def _checked(positions: Tensor, tokens: Tensor) -> Tensor:
        """The positions that the model is called with."""
        batch, length = tokens.shape[:2]
        expect_index({"B": batch}, "sink_positions", positions, "B M")
        return checked_indices(positions.device, sink_positions=positions, seq_len=length).sink_positions

    def _find_positions(self, input_ids: Tensor | None, visible: Tensor | None) -> Tensor:
        """Positions [B, M] of the sinks outside padding, padded with -1."""
        is_sink = self._is_sink(input_ids)
        if is_sink is None or input_ids is None:
            expected = "given where the model has no sink_token_id or is called without input_ids"
            raise ValueError(f"sink_positions must be {expected}, got None")
        if visible is not None:
            is_sink = is_sink & visible
        counts = is_sink.sum(dim=1)
        if self.max_sinks is None:
            expect(not torch.compiler.is_exporting(), "max_sinks", "given to export the model", None)
            # At least one, so that every batch uses the parameters of the bias: DDP requires it.
            most = max(1, int(counts.max())) if counts.numel() else 1
        else:
            most = self.max_sinks
            self._expect_at_most(most, counts)
        batch, length = input_ids.shape
        tokens = torch.arange(length, device=input_ids.device).expand(batch, length)
        column = torch.where(is_sink, is_sink.cumsum(dim=1) - 1, most)  # an extra column for all other tokens
        positions = tokens.new_full((batch, most + 1), -1).scatter(1, column, tokens)
        return positions[:, :most]

    @staticmethod
    def _expect_at_most(most: int, counts: Tensor) -> None:
        expected = f"input_ids must be of at most max_sinks = {most} sinks a sequence"
        if values_are_checked(counts.device):
            expect_values(counts <= most, expected, lambda row: counts[row].item())
        else:  # without a synchronisation
            assert_on_device((counts <= most).all(), expected)

    def _expect_unpacked(self, position_ids: Tensor | None, valid: Tensor) -> None:
        """Raise if a decoder gets sinks in packed sequences, which transformers finds by restarting position_ids."""
        if position_ids is None or not is_causal(self.attentions[0]):
            return
        unpacked = ~valid.any() | (position_ids.diff(dim=-1) == 1).all()
        expected = "position_ids must be ascending by 1 in sequences with sinks"
        expect_values(unpacked, expected, lambda: "packed sequences")

    def _read_padding(self, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None, bool]:
        """seq_lens, seq_starts and needs_mask of `Sinks`, from a mask [B, N] that is True at tokens."""
        if mask is None:
            return None, None, False
        windows = find_windows(mask)
        if self.padding_side is not None:
            if values_are_checked(mask.device):
                expected = "the tokens of an attention_mask must have no gap, as padding_side says"
                expect_values(are_windows(windows), expected, lambda row: f"{mask[row].int().tolist()} in row {row}")
        elif torch.compiler.is_compiling():
            expected = "the tokens of an attention_mask must have no gap in a compiled model"
            assert_on_device(are_windows(windows).all(), expected)
        elif mask.all():
            return None, None, False
        elif not are_windows(windows).all():
            return None, None, True
        return windows.seq_lens, windows.seq_starts, False

    def _follows_prompt(
        self, seen: int | Tensor, length: int, input_ids: Tensor | None, positions: Tensor | None
    ) -> bool:
        """Whether the tokens continue a cached prompt. Raise if a sink follows the prompt.

        The bias of a later sink would need the hidden states of the prompt, which are not cached.
        """
        is_sink = self._is_sink(input_ids)
        if torch.compiler.is_compiling() and isinstance(seen, Tensor):  # a static cache
            late = is_sink if positions is None else positions >= seen
            if late is not None:
                assert_on_device((seen == 0) | ~late.any(), "the sinks must be among the tokens of the prompt")
            return length == 1
        seen = int(seen)
        among = f"among the {seen} tokens of the prompt: a later one would need their hidden states"
        if seen > 0 and positions is not None:
            largest = int(positions.max()) if positions.numel() else -1
            expect(largest < seen, "sink_positions", among, largest)
        elif seen > 0 and is_sink is not None:
            expect(not is_sink.any(), "the sinks", among, "one after it")
        return seen > 0

    def _warn_of_frozen_biases(self) -> None:
        named = (pair for attention in self.attentions for pair in getattr(attention, BIAS).named_parameters())
        # PEFT has the parameter twice, the original and the copy in modules_to_save.
        if not self.warned and not any(p.requires_grad for name, p in named if name.endswith("scale")):
            self.warned = True
            warnings.warn(
                "every bias between sinks is frozen; with PEFT, let it train: "
                f"LoraConfig(..., modules_to_save=[{BIAS!r}])",
                stacklevel=2,
            )


class BiasAdder:
    """Hook before an attention: computes its bias and passes it to the attention function."""

    def __init__(self, adapter: Adapter, attention: Any) -> None:
        self.adapter, self.names = adapter, _argument_names(attention)

    def __call__(self, attention: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        sinks = self.adapter.read_sinks(arguments)
        expect(sinks is not None, "the base model", "called to find the sinks", "a call of its layers alone")
        if sinks is not None and sinks.positions is not None:
            hidden_states = arguments[self.adapter.hidden_states]
            bias = getattr(attention, BIAS)(hidden_states, sinks.positions, sinks.valid)
            self.adapter.pass_bias(arguments, bias)
        return (), arguments


def rename_official_scale(attention: Any, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Hook before load_state_dict: renames the scale of the official code, a scalar of the attention module."""
    if f"{prefix}sink_scale" in state_dict:
        state_dict[f"{prefix}{BIAS}.scale"] = state_dict.pop(f"{prefix}sink_scale").reshape(1)


def _argument_names(module: Any) -> list[str]:
    """The names of the arguments of a module, in their order."""
    parameters = inspect.signature(type(module).forward).parameters
    return [name for name, p in parameters.items() if p.kind != p.VAR_KEYWORD][1:]


def _read_valid_tokens(mask: Any) -> Tensor | None:
    """Valid tokens of an attention mask, [B, N] bool; None if unknown.

    The mask is [B, N], or [B, 1, N, N], in which padding is hidden from itself, or a dict of these per type of layer.
    """
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask.bool()
    own = mask[:, 0].diagonal(dim1=1, dim2=2)
    return own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2

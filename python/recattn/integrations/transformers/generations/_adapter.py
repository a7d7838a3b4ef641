"""What the rest of the package asks of an architecture."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from recattn.integrations.transformers.attention import NAME, Sinks


class Adapter(ABC):
    """How an architecture of this generation gets sink attention. Adapters keep nothing about a model."""

    # The argument of the attention module that its queries, keys and values are made of.
    hidden_states = "hidden_states"

    def expect_supported(self, model: nn.Module) -> None:  # noqa: B027
        """Raise a ValueError for options of the model that its sink attention would not see."""

    def enable(self, model: nn.Module, attentions: list[nn.Module]) -> Callable[[], None]:
        """Make sink attention the attention of the model. Returns the function that undoes it.

        The config is set: `set_attn_implementation` came in 4.54, and up to 5.6 it refuses ModernBERT.
        """
        config, previous = model.config, model.config._attn_implementation
        config._attn_implementation = NAME
        return functools.partial(setattr, config, "_attn_implementation", previous)

    @abstractmethod
    def pass_sinks(self, arguments: dict[str, object], sinks: Sinks) -> None:
        """Add the sinks of a batch to the arguments of the base model."""

    @abstractmethod
    def read_sinks(self, arguments: dict[str, object]) -> Sinks | None:
        """The sinks among the arguments of an attention module."""

    @abstractmethod
    def pass_bias(self, arguments: dict[str, object], bias: Tensor) -> None:
        """Add the bias of a layer to the arguments of its attention module."""

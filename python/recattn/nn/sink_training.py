"""The training of CTR-Sink (arXiv 2508.03668) in two stages: what is pooled, and when the stage changes."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recattn._check import expect, expect_choice, expect_index, expect_same_device, expect_shape, expect_tensors
from recattn.functional.validation import checked_indices
from recattn.nn._masks import as_mask, mask_of_sinks

if TYPE_CHECKING:
    from transformers import TrainerCallback

STAGES = ("sinks", "tokens")


class SinkPooling(nn.Module):
    """The user's vector: the mean of the hidden states of a set of tokens S,

        u = (1/|S|) Σ_{i∈S} h_i        S: the sinks (stage "sinks"), or all tokens but padding (stage "tokens")

    CTR-Sink's official code trains by the first, then by the second, and evaluates by the second always. So does this
    module: `stage` counts while `training`; in eval it is "tokens". A row without sinks is pooled over all its tokens
    (ours); one without tokens is 0. The module has no parameters, and its stage is no part of the state dict:
    `TwoStageSchedule` keeps it.
    """

    def __init__(self, stage: str = "tokens") -> None:
        super().__init__()
        self.stage = stage

    @property
    def stage(self) -> str:
        """Of training: "sinks" or "tokens"."""
        return self._stage

    @stage.setter
    def stage(self, stage: str) -> None:
        expect_choice("stage", stage, STAGES)
        self._stage = stage

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        sink_positions: Tensor | None = None,
        *,
        stage: str | None = None,
    ) -> Tensor:
        """
        Args:
            hidden_states: [B, N, d]. Padding may hold anything.
            attention_mask: [B, N], True or 1 at tokens, False or 0 at padding, on any side.
            sink_positions: [B, M], padded with -1; those of padding do not count. Stage "tokens" needs none.
            stage: for this call, whatever the mode.

        Returns:
            [B, d], of the dtype of `hidden_states`; summed in float32 at least.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit, or stage "sinks" without `sink_positions`; on a CPU
                (elsewhere under RECATTN_CHECK=1) also values that do.
        """
        if stage is None:
            stage = self.stage if self.training else "tokens"
        expect_choice("stage", stage, STAGES)
        expect_tensors(hidden_states=hidden_states)
        sizes: dict[str, int] = {}
        expect_shape(sizes, "hidden_states", hidden_states, "B N d")
        device, n = hidden_states.device, sizes["N"]
        expect_same_device("hidden_states", hidden_states, attention_mask=attention_mask, sink_positions=sink_positions)
        if attention_mask is None:
            pooled = torch.ones(sizes["B"], n, dtype=torch.bool, device=device)
        else:
            pooled = as_mask(sizes, "attention_mask", attention_mask, "B N")
        if stage == "sinks":
            expect(sink_positions is not None, "sink_positions", "given to pool the sinks", None)
            expect_index(sizes, "sink_positions", sink_positions, "B M")
            sink_positions = checked_indices(device, sink_positions=sink_positions, seq_len=n).sink_positions
            sinks = mask_of_sinks(sink_positions, n) & pooled
            pooled = torch.where(sinks.any(dim=1, keepdim=True), sinks, pooled)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        total = hidden_states.masked_fill(~pooled[..., None], 0).sum(dim=1, dtype=dtype)
        return (total / pooled.sum(dim=1, keepdim=True).clamp(min=1)).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"stage={self.stage!r}"


class TwoStageSchedule:
    """CTR-Sink's two stages: `pooling.stage` is "sinks" for the first epochs (or optimizer steps), then "tokens".

    The official recipe is three epochs of each, with one AdamW and one cosine schedule across both, and all weights
    trained in both: nothing but the pooling changes. In a loop of your own, call `start_epoch` before each epoch, or
    with `sink_steps` `step` after each optimizer step; for transformers' Trainer there is `trainer_callback`.

    Args:
        pooling: the model's.
        sink_epochs, sink_steps: how long the first stage is; one of the two.
    """

    def __init__(self, pooling: SinkPooling, *, sink_epochs: int | None = None, sink_steps: int | None = None) -> None:
        expect(isinstance(pooling, SinkPooling), "pooling", "a SinkPooling", type(pooling).__name__)
        one = "given without the other of sink_epochs and sink_steps"
        expect((sink_epochs is None) != (sink_steps is None), "sink_epochs", one, (sink_epochs, sink_steps))
        self.pooling = pooling
        self.unit, self.switch_at = ("step", sink_steps) if sink_epochs is None else ("epoch", sink_epochs)
        expect(self.switch_at >= 0, f"sink_{self.unit}s", "at least 0", self.switch_at)
        self._reach(0)

    @property
    def stage(self) -> str:
        return self.pooling.stage

    def start_epoch(self, epoch: int) -> None:
        """Epoch `epoch` begins, counted from 0."""
        self._expect_unit("epoch", "start_epoch")
        expect(epoch >= 0, "epoch", "at least 0", epoch)
        self._reach(epoch)

    def step(self) -> None:
        """One more optimizer step is done."""
        self._expect_unit("step", "step")
        self._reach(self.count + 1)

    def state_dict(self) -> dict[str, int]:
        return {self.unit: self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up the stage of a saved state."""
        expect(set(state) == {self.unit}, "state", f"of a schedule counted by the {self.unit}", state)
        self._reach(state[self.unit])

    def trainer_callback(self) -> "TrainerCallback":
        """A callback of transformers' Trainer that sets the stage before each epoch (or step) it trains.

        The Trainer's own count decides, which it restores from a checkpoint. A dataset without a length is one epoch
        to it: use `sink_steps` there.
        """
        try:
            from transformers import TrainerCallback
        except ImportError as error:
            raise ImportError("trainer_callback needs transformers: pip install transformers") from error
        schedule = self

        class TwoStageCallback(TrainerCallback):
            def on_epoch_begin(self, args, state, control, **kwargs):
                if schedule.unit == "epoch":
                    # The fraction of an epoch that a checkpoint within it was saved at.
                    schedule._reach(int(state.epoch))

            def on_step_begin(self, args, state, control, **kwargs):
                if schedule.unit == "step":
                    schedule._reach(state.global_step)

        return TwoStageCallback()

    def _reach(self, count: int) -> None:
        self.count = count
        self.pooling.stage = "sinks" if count < self.switch_at else "tokens"

    def _expect_unit(self, unit: str, method: str) -> None:
        expect(self.unit == unit, method, f"called on a schedule of sink_{unit}s", f"one of sink_{self.unit}s")

"""CTR-Sink's training in two stages (arXiv 2508.03668): the pooling and its schedule."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recattn._check import expect, expect_choice, expect_index, expect_same_device, expect_shape, expect_tensors
from recattn._typing import Stage
from recattn.functional.validation import checked_indices
from recattn.nn._masks import make_sink_mask, read_mask

if TYPE_CHECKING:
    from transformers import TrainerCallback

STAGES = ("sinks", "tokens")


class SinkPooling(nn.Module):
    """The user vector, the mean of the hidden states over a set of tokens S:

        u = (1/|S|) Σ_{i∈S} h_i        S: the sinks (stage "sinks"), or all tokens except padding (stage "tokens")

    As in CTR-Sink's official code, training uses "sinks" first and then "tokens", and evaluation always uses "tokens":
    `stage` applies in training mode only. A row without sinks is pooled over all its tokens (our choice); a row without
    tokens gives 0. The module has no parameters. Its stage is not in the state dict but in that of `TwoStageSchedule`.
    """

    def __init__(self, stage: Stage = "tokens") -> None:
        super().__init__()
        self.stage = stage

    @property
    def stage(self) -> Stage:
        """The stage in training mode, "sinks" or "tokens"."""
        return self._stage

    @stage.setter
    def stage(self, stage: Stage) -> None:
        expect_choice("stage", stage, STAGES)
        self._stage: Stage = stage

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        sink_positions: Tensor | None = None,
        *,
        stage: Stage | None = None,
    ) -> Tensor:
        """
        Args:
            hidden_states: [B, N, d]. Padding may hold anything.
            attention_mask: [B, N], True or 1 at tokens, False or 0 at padding, on any side.
            sink_positions: [B, M], padded with -1; sinks in padding are ignored. Not needed for stage "tokens".
            stage: the stage of this call, in training and evaluation.

        Returns:
            [B, d], in the dtype of `hidden_states`; summed in float32 or wider.

        Raises:
            ValueError: a shape, dtype or device does not match, or stage "sinks" without `sink_positions`; on a CPU
                (elsewhere under RECATTN_CHECK=1) also a mask other than 0 and 1, or positions out of range or order.
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
            pooled = read_mask(sizes, "attention_mask", attention_mask, "B N")
        if stage == "sinks":
            if sink_positions is None:
                raise ValueError("sink_positions must be given to pool the sinks, got None")
            expect_index(sizes, "sink_positions", sink_positions, "B M")
            indices = checked_indices(device, sink_positions=sink_positions, seq_len=n)
            sinks = make_sink_mask(indices.sink_positions, n) & pooled
            pooled = torch.where(sinks.any(dim=1, keepdim=True), sinks, pooled)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        total = hidden_states.masked_fill(~pooled[..., None], 0).sum(dim=1, dtype=dtype)
        return (total / pooled.sum(dim=1, keepdim=True).clamp(min=1)).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"stage={self.stage!r}"


class TwoStageSchedule:
    """CTR-Sink's two stages: sets `pooling.stage` to "sinks" for the first epochs (or steps), then to "tokens".

    The official recipe is three epochs of each stage with one AdamW and one cosine schedule for both. All weights are
    trained in both; only the pooling changes. In your own loop, call `start_epoch` before each epoch, or with
    `sink_steps` call `step` after each optimizer step. With transformers' Trainer, use `trainer_callback`.

    Args:
        pooling: the SinkPooling of the model.
        sink_epochs, sink_steps: length of the first stage in epochs or in optimizer steps; give one of the two.
    """

    def __init__(self, pooling: SinkPooling, *, sink_epochs: int | None = None, sink_steps: int | None = None) -> None:
        expect(isinstance(pooling, SinkPooling), "pooling", "a SinkPooling", type(pooling).__name__)
        one = "given without the other of sink_epochs and sink_steps"
        expect((sink_epochs is None) != (sink_steps is None), "sink_epochs", one, (sink_epochs, sink_steps))
        self.pooling = pooling
        self.unit = "step" if sink_epochs is None else "epoch"
        self.switch_at: Any = sink_steps if sink_epochs is None else sink_epochs  # an int, as one of them is given
        expect(self.switch_at >= 0, f"sink_{self.unit}s", "at least 0", self.switch_at)
        self._set_count(0)

    @property
    def stage(self) -> Stage:
        return self.pooling.stage

    def start_epoch(self, epoch: int) -> None:
        """Call before each epoch. `epoch` counts from 0."""
        self._expect_unit("epoch", "start_epoch")
        expect(epoch >= 0, "epoch", "at least 0", epoch)
        self._set_count(epoch)

    def step(self) -> None:
        """Call after each optimizer step."""
        self._expect_unit("step", "step")
        self._set_count(self.count + 1)

    def state_dict(self) -> dict[str, int]:
        return {self.unit: self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Set the count and the stage from a saved state."""
        expect(set(state) == {self.unit}, "state", f"of a schedule counted by the {self.unit}", state)
        self._set_count(state[self.unit])

    def trainer_callback(self) -> "TrainerCallback":
        """A callback for transformers' Trainer that sets the stage before each epoch (or step).

        It follows the Trainer's count, which the Trainer restores from a checkpoint. The Trainer counts a dataset
        without a length as a single epoch: use `sink_steps` there.
        """
        try:
            from transformers import TrainerCallback
        except ImportError as error:
            raise ImportError("trainer_callback needs transformers: pip install transformers") from error
        schedule = self

        class TwoStageCallback(TrainerCallback):
            def on_epoch_begin(self, args, state, control, **kwargs):
                if schedule.unit == "epoch":
                    # A fraction if training resumes from a checkpoint within an epoch.
                    schedule._set_count(int(state.epoch))

            def on_step_begin(self, args, state, control, **kwargs):
                if schedule.unit == "step":
                    schedule._set_count(state.global_step)

        return TwoStageCallback()

    def _set_count(self, count: int) -> None:
        self.count = count
        self.pooling.stage = "sinks" if count < self.switch_at else "tokens"

    def _expect_unit(self, unit: str, method: str) -> None:
        expect(self.unit == unit, method, f"called on a schedule of sink_{unit}s", f"one of sink_{self.unit}s")

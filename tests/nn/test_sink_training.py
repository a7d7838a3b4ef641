"""SinkPooling, the two-stage schedule, and both under transformers' Trainer."""

import sys

import pytest
import torch
from torch import nn

from recattn.nn.sink_tokens import (
    insert_sinks,
)
from recattn.nn.sink_training import SinkPooling, TwoStageSchedule
from recattn.testing import assert_matches_reference

SINK = 99


# --- SinkPooling ---

MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
POSITIONS = torch.tensor([[1, 3], [3, -1], [-1, -1], [2, -1]])


def pooled_by_hand(hidden_states, stage):
    pooled = []
    for row, mask, positions in zip(hidden_states, MASK.tolist(), POSITIONS.tolist(), strict=True):
        tokens = [i for i, valid in enumerate(mask) if valid]
        sinks = [i for i in positions if i in tokens]
        chosen = sinks if stage == "sinks" and sinks else tokens
        zeros = torch.zeros(row.shape[1], dtype=row.dtype)
        pooled.append(sum((row[i] for i in chosen), zeros) / max(len(chosen), 1))
    return torch.stack(pooled)


@pytest.mark.parametrize("stage", ["sinks", "tokens"])
def test_pooling_by_hand(stage):
    hidden_states = torch.randn(4, 5, 3, dtype=torch.float64)
    hidden_states[MASK == 0] = torch.nan
    hidden_states.requires_grad_()
    actual = SinkPooling(stage)(hidden_states, MASK, POSITIONS)
    expected = pooled_by_hand(hidden_states, stage)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    incoming = torch.randn_like(actual)
    mine, other = (torch.autograd.grad(x, hidden_states, incoming)[0] for x in (actual, expected))
    torch.testing.assert_close(mine, other, atol=1e-12, rtol=0)
    assert torch.equal(actual, SinkPooling(stage)(hidden_states, MASK.bool(), POSITIONS))


def test_stage_counts_while_training_only():
    hidden_states = torch.randn(4, 5, 3)
    pooling = SinkPooling("sinks")
    sinks, tokens = (pooled_by_hand(hidden_states, stage) for stage in ("sinks", "tokens"))
    arguments = hidden_states, MASK, POSITIONS
    torch.testing.assert_close(pooling(*arguments), sinks)
    torch.testing.assert_close(pooling.eval()(*arguments), tokens)
    torch.testing.assert_close(pooling(*arguments, stage="sinks"), sinks)
    torch.testing.assert_close(pooling.train()(*arguments, stage="tokens"), tokens)
    torch.testing.assert_close(SinkPooling()(hidden_states), hidden_states.mean(dim=1))
    assert repr(pooling) == "SinkPooling(stage='sinks')" and pooling.state_dict() == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stage", ["sinks", "tokens"])
def test_low_precision_pooling(stage, dtype):
    assert_matches_reference(
        lambda hidden_states: SinkPooling(stage)(hidden_states, MASK, POSITIONS),
        lambda hidden_states: pooled_by_hand(hidden_states, stage),
        {"hidden_states": torch.randn(4, 5, 3).to(dtype)},
        grads=["hidden_states"],
    )


def test_long_sums_do_not_overflow():
    assert SinkPooling()(torch.full((1, 4096, 2), 100.0, dtype=torch.float16)).tolist() == [[100, 100]]


def test_wrong_pooling_is_refused():
    hidden_states = torch.randn(4, 5, 3)
    with pytest.raises(ValueError, match="stage must be 'sinks' or 'tokens', got 'sink'"):
        SinkPooling("sink")
    with pytest.raises(ValueError, match="stage must be 'sinks' or 'tokens', got 'token'"):
        SinkPooling().stage = "token"
    with pytest.raises(ValueError, match="sink_positions must be given to pool the sinks, got None"):
        SinkPooling("sinks")(hidden_states, MASK)
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, N\] = \[4, 5\], got \[4, 4\]"):
        SinkPooling()(hidden_states, MASK[:, 1:])
    with pytest.raises(ValueError, match="sink_positions must be below the sequence length 5, got 5"):
        SinkPooling("sinks")(hidden_states, MASK, POSITIONS + 2)


# --- TwoStageSchedule ---


def test_epochs():
    pooling = SinkPooling()
    schedule = TwoStageSchedule(pooling, sink_epochs=3)
    stages = [pooling.stage]
    for epoch in range(6):
        schedule.start_epoch(epoch)
        stages.append(schedule.stage)
    assert stages == ["sinks"] * 4 + ["tokens"] * 3 and pooling.stage == "tokens"
    schedule.start_epoch(2)
    assert pooling.stage == "sinks"


def test_steps():
    schedule = TwoStageSchedule(SinkPooling(), sink_steps=2)
    stages = []
    for _ in range(4):
        stages.append(schedule.pooling.stage)
        schedule.step()
    assert stages == ["sinks", "sinks", "tokens", "tokens"]
    assert TwoStageSchedule(SinkPooling(), sink_steps=0).stage == "tokens"


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_state_of_a_schedule(unit):
    schedule = TwoStageSchedule(SinkPooling(), **{f"sink_{unit}s": 2})
    for n in range(3):
        schedule.step() if unit == "step" else schedule.start_epoch(n)
    resumed = TwoStageSchedule(SinkPooling(), **{f"sink_{unit}s": 2})
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.stage == schedule.stage == "tokens" and resumed.state_dict() == schedule.state_dict()
    with pytest.raises(ValueError, match=f"state must be of a schedule counted by the {unit}, got"):
        schedule.load_state_dict({"batch": 1})


def test_wrong_schedules_are_refused():
    with pytest.raises(ValueError, match=r"sink_epochs must be given without the other .* got \(None, None\)"):
        TwoStageSchedule(SinkPooling())
    with pytest.raises(ValueError, match="sink_epochs must be given without the other"):
        TwoStageSchedule(SinkPooling(), sink_epochs=1, sink_steps=1)
    with pytest.raises(ValueError, match="sink_steps must be at least 0, got -1"):
        TwoStageSchedule(SinkPooling(), sink_steps=-1)
    with pytest.raises(ValueError, match="pooling must be a SinkPooling, got Identity"):
        TwoStageSchedule(nn.Identity(), sink_epochs=1)
    with pytest.raises(ValueError, match="start_epoch must be called on a schedule of sink_epochs, got one of sink_s"):
        TwoStageSchedule(SinkPooling(), sink_steps=1).start_epoch(0)
    with pytest.raises(ValueError, match="step must be called on a schedule of sink_steps, got one of sink_epochs"):
        TwoStageSchedule(SinkPooling(), sink_epochs=1).step()


def test_callback_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="trainer_callback needs transformers: pip install transformers"):
        TwoStageSchedule(SinkPooling(), sink_epochs=1).trainer_callback()


# --- transformers' Trainer ---


class Classifier(nn.Module):
    """A BERT of one layer, pooled; it notes the stage of every batch it sees."""

    def __init__(self):
        super().__init__()
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        # No dropout: an evaluation between, which a run resumed after it lacks, moves the random numbers.
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        self.encoder = BertModel(BertConfig(vocab_size=100, **sizes, **no_dropout), add_pooling_layer=False)
        self.pooling = SinkPooling()
        self.head = nn.Linear(16, 1)
        self.seen = []

    def forward(self, input_ids, attention_mask, sink_positions, labels):
        hidden_states = self.encoder(input_ids, attention_mask).last_hidden_state
        user = self.pooling(hidden_states, attention_mask, sink_positions)
        by_stage = {
            stage: self.pooling(hidden_states, attention_mask, sink_positions, stage=stage)
            for stage in ("sinks", "tokens")
        }
        (stage,) = (stage for stage, x in by_stage.items() if torch.equal(user, x))
        self.seen.append((self.training, stage))
        logits = self.head(user)[:, 0]
        return {"loss": nn.functional.binary_cross_entropy_with_logits(logits, labels), "logits": logits}


def dataset(rows=6):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 90, (rows, 3, 2), generator=generator).tolist()
    tokens = insert_sinks(ids, SINK)
    names = ("input_ids", "attention_mask", "sink_positions")
    return [
        {name: getattr(tokens, name)[b] for name in names} | {"labels": torch.tensor(float(b % 2))} for b in range(rows)
    ]


def train(folder, resume=None, **sinks):
    """Four epochs of three steps, each followed by an evaluation and a checkpoint at every step."""
    from transformers import Trainer, TrainingArguments

    model = Classifier()
    schedule = TwoStageSchedule(model.pooling, **sinks)
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=4,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=6,
        eval_strategy="epoch",
        save_steps=1,
        lr_scheduler_type="cosine",
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=5,
        dataloader_pin_memory=False,
    )
    Trainer(
        model,
        arguments,
        train_dataset=dataset(),
        eval_dataset=dataset(),
        callbacks=[schedule.trainer_callback()],
    ).train(resume_from_checkpoint=resume)
    return model


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, train(folder, sink_epochs=2)


def epoch_of(stage, steps=3):
    return [(True, stage)] * steps + [(False, "tokens")]


def test_trainer_switches_at_the_boundary(uninterrupted):
    _, model = uninterrupted
    assert model.seen == epoch_of("sinks") * 2 + epoch_of("tokens") * 2


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        (5, epoch_of("sinks", 1) + epoch_of("tokens") * 2),
        (6, epoch_of("tokens") * 2),
        (7, epoch_of("tokens", 2) + epoch_of("tokens")),
    ],
)
def test_resumed_trainer_takes_up_its_stage(uninterrupted, tmp_path, checkpoint, expected):
    folder, whole = uninterrupted
    resumed = train(tmp_path, folder / f"checkpoint-{checkpoint}", sink_epochs=2)
    assert resumed.seen == expected
    for (name, mine), other in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_trainer_counts_steps(tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    model = train(tmp_path, sink_steps=4)
    trained = [stage for training, stage in model.seen if training]
    assert trained == ["sinks"] * 4 + ["tokens"] * 8
    resumed = train(tmp_path, tmp_path / "checkpoint-3", sink_steps=4)
    assert [stage for training, stage in resumed.seen if training] == ["sinks"] + ["tokens"] * 8

"""RecTools' SASRec with refined layers, by its public API."""

import importlib
import importlib.util
import logging

import pytest
import torch
from torch import nn

from benchmarks.data import movielens
from recattn.nn import RefinedSelfAttention

MODULE = "recattn.integrations.rectools"
E, H, N, B, BLOCKS = 16, 2, 8, 5, 2
LENGTHS = torch.tensor([8, 5, 1, 3, 7])
TOKENS = torch.arange(N) >= N - LENGTHS[:, None]  # RecTools pads on the left
CAUSAL = torch.ones(N, N, dtype=torch.bool).triu(1)
needs_rectools = pytest.mark.skipif(
    importlib.util.find_spec("rectools") is None, reason="RecTools is not installed (it needs numpy < 2)"
)


def layers(**refinement):
    kind = importlib.import_module(MODULE).RefinedSASRecLayers
    return kind(BLOCKS, E, H, 0.0, max_len=N, **refinement).double()


def stock():
    return importlib.import_module("rectools.models.nn.transformers.sasrec").SASRecTransformerLayers


@needs_rectools
def test_without_a_refinement_they_are_rectools_own_layers():
    """With W_V = 0 additive is plain attention at valid tokens, as with RecTools' merged mask."""
    refined = layers(mechanism="additive")
    plain = stock()(BLOCKS, E, H, 0.0).double()
    report = refined.load_state_dict(plain.state_dict(), strict=False)
    names = [f"transformer_blocks.{i}.multi_head_attn.w_{x}" for i in range(BLOCKS) for x in "qkv"]
    assert report.missing_keys == names and report.unexpected_keys == []
    x, timeline = torch.randn(B, N, E, dtype=torch.float64), TOKENS[..., None]
    before = refined(x.clone(), timeline, CAUSAL, None)
    for block in refined.transformer_blocks:
        assert isinstance(block.multi_head_attn, RefinedSelfAttention)
        nn.init.zeros_(block.multi_head_attn.w_v)
    merged = (CAUSAL | ~TOKENS[:, None]) & ~torch.eye(N, dtype=torch.bool)
    expected = plain(x.clone(), timeline, merged.repeat_interleave(H, 0), None)
    actual = refined(x.clone(), timeline, CAUSAL, None)
    torch.testing.assert_close(actual[TOKENS], expected[TOKENS], atol=1e-10, rtol=0)
    assert (before - actual)[TOKENS].abs().max() > 1e-3


@needs_rectools
@pytest.mark.parametrize("mechanism", ["simple", "value", "additive", "stochastic"])
def test_neither_padding_nor_the_future_reaches_a_state(mechanism):
    refined = layers(mechanism=mechanism)
    x = torch.randn(B, N, E, dtype=torch.float64)
    changed = x.clone()
    changed[~TOKENS] = 7.0
    changed[:, -1] = -3.0
    states, others = (refined(y.clone(), TOKENS[..., None], CAUSAL, None) for y in (x, changed))
    earlier = TOKENS & (torch.arange(N) < N - 1)
    torch.testing.assert_close(states[earlier], others[earlier], atol=1e-12, rtol=0)
    assert not torch.allclose(states[:, -1], others[:, -1])
    both_ways = refined(x.clone(), TOKENS[..., None], None, None)
    assert not torch.allclose(both_ways[earlier], states[earlier])


@needs_rectools
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_padding_may_hold_anything(value):
    refined, x = layers(), torch.randn(B, N, E, dtype=torch.float64)
    results = []
    for filled in (x.masked_fill(~TOKENS[..., None], 0), x.masked_fill(~TOKENS[..., None], value)):
        out = refined(filled.requires_grad_(), TOKENS[..., None], CAUSAL, None)[TOKENS]
        results.append([out, *torch.autograd.grad(out.square().sum(), [filled, *refined.parameters()])])
    assert all(torch.equal(clean, dirty) and dirty.isfinite().all() for clean, dirty in zip(*results, strict=True))


@needs_rectools
def test_wrong_masks_are_refused():
    refined, x = layers(), torch.randn(B, N, E, dtype=torch.float64)
    with pytest.raises(ValueError, match="use_key_padding_mask must be False: the padding is hidden without it"):
        refined(x, TOKENS[..., None], CAUSAL.expand(B * H, N, N), None)
    with pytest.raises(ValueError, match=r"attn_mask must be the causal mask.*shows key 1 to query 0"):
        refined(x, TOKENS[..., None], torch.zeros_like(CAUSAL), None)
    with pytest.raises(ValueError, match=r"key_padding_mask must be True at the starts of the sequences only"):
        refined(x, TOKENS.flip(1)[..., None], CAUSAL, None)
    with pytest.raises(TypeError, match="max_len"):
        importlib.import_module(MODULE).RefinedSASRecLayers(BLOCKS, E, H, 0.0)


@needs_rectools
def test_sasrec_fits_and_recommends():
    """A short fit on MovieLens-100k histories, and the model rebuilt from its configuration."""
    import pandas as pd
    import pytorch_lightning
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    sample = movielens.load(offline=True).sample(60, longest=30)
    rows = [(user, int(item), 1.0, when) for user, items in enumerate(sample) for when, item in enumerate(items)]
    frame = pd.DataFrame(rows, columns=[Columns.User, Columns.Item, Columns.Weight, Columns.Datetime])
    frame[Columns.Datetime] = pd.to_datetime(frame[Columns.Datetime], unit="D")
    data = Dataset.construct(frame)
    losses = []

    class Record(pytorch_lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            losses.append(outputs["loss"].item())

    def trainer():
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        options = {"max_epochs": 25, "accelerator": "cpu", "enable_model_summary": False, "callbacks": [Record()]}
        return pytorch_lightning.Trainer(**quiet, **options)

    options = {
        "n_factors": E,
        "n_heads": H,
        "n_blocks": BLOCKS,
        "session_max_len": 20,
        "batch_size": 32,
        "lr": 1e-2,
        "transformer_layers_type": importlib.import_module(MODULE).RefinedSASRecLayers,
        "transformer_layers_kwargs": {"max_len": 20, "mechanism": "value"},
    }
    model = SASRecModel(**options, get_trainer_func=trainer)
    pytorch_lightning.seed_everything(0)
    model.fit(data)
    attentions = [m for m in model.torch_model.modules() if isinstance(m, RefinedSelfAttention)]
    assert len(attentions) == BLOCKS and all(a.mechanism == "value" and a.max_len == 20 for a in attentions)
    assert losses[-1] < 0.8 * losses[0]
    recommended = model.recommend(users=frame[Columns.User].unique(), dataset=data, k=5, filter_viewed=True)
    assert len(recommended) == 5 * len(sample) and recommended[Columns.Score].notna().all()
    config = SASRecModel(**options).get_config(simple_types=True)
    assert config["transformer_layers_type"] == f"{MODULE}.RefinedSASRecLayers"
    assert SASRecModel.from_config(config).transformer_layers_kwargs == options["transformer_layers_kwargs"]

"""CTR-Sink's experiment on a few users of MovieLens-100k: what is written, who sees what, and that it trains."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")

from benchmarks.data import minilm, movielens
from benchmarks.quality import ctr_sink, paired
from benchmarks.quality.ctr_sink import ARMS, BIAS, NO_SINKS, SEPARATORS, SINKS, ClickModel, Clicks, Hyperparameters

CPU = torch.device("cpu")
HYPER = Hyperparameters(behaviors=5, targets=4, batch=4, dtype="float32", epochs=1)


@pytest.fixture(scope="module")
def clicks():
    try:
        minilm.folder()
        movielens.items()
    except FileNotFoundError as error:
        pytest.skip(f"needs MiniLM and MovieLens-100k: {error}")
    if (users := movielens.events()) is None:
        pytest.skip("needs MovieLens-100k")
    return Clicks([own[:20] for own in users[:12]], "twelve users")


def writer(arm):
    torch.manual_seed(0)
    model = ClickModel(arm, HYPER).eval()
    return model, ctr_sink.Writer(arm, model.sink_embedding)


def test_no_sample_knows_the_future(clicks):
    parts = clicks.split(HYPER)
    assert [{s.user for s in part} for part in parts] == [set(range(12))] * 3
    for sample in (s for part in parts for s in part):
        times = [event.time for event in (*sample.history, *sample.targets)]
        assert times == sorted(times) and 1 <= len(sample.targets) <= 4 <= len(sample.history) <= 5
    for user, own in enumerate(clicks.users):
        asked = [[event for s in part if s.user == user for event in s.targets] for part in parts]
        assert asked == [own[4:15], own[15:16], own[16:]]  # each rating after the fourth, once


def test_what_is_written(clicks):
    """The arms differ in what is between two ratings, and in nothing else."""
    sample = next(s for s in clicks.samples(0, 1, HYPER) if len(s.history) == 5)
    written = {}
    for arm in ARMS:
        _, own = writer(arm)
        text = own.histories([sample])
        tokenizer = minilm.tokenizer()
        written[arm] = tokenizer.convert_ids_to_tokens(text.input_ids[0].tolist())
        count = 0 if arm == NO_SINKS else 4
        assert text.sink_positions.shape == text.sink_ids.shape == (1, count)
        between = [written[arm][i] for i in text.sink_positions[0].tolist()]
        assert between == [{SEPARATORS: "[SEP]"}.get(arm, ctr_sink.SINK)] * count
    assert written[SINKS] == written[BIAS]
    assert [t for t in written[SINKS] if t != ctr_sink.SINK] == written[NO_SINKS]
    assert [t for t in written[SEPARATORS][:-1] if t != "[SEP]"] == written[NO_SINKS][:-1]
    title = minilm.tokenizer().tokenize(movielens.items()[sample.history[0].item].title)[: ctr_sink.TITLE_TOKENS]
    assert written[NO_SINKS][1:3] == [str(int(sample.history[0].rating)), "stars"]
    assert written[NO_SINKS][3 : 3 + len(title)] == title
    assert written[NO_SINKS][3 + len(title)] in [name for name, _ in ctr_sink.AGES]


def test_targets(clicks):
    samples = list(clicks.samples(0, 1, HYPER))[:3]
    _, own = writer(NO_SINKS)
    films = own.targets(samples)
    expected = [(row, event) for row, s in enumerate(samples) for event in s.targets]
    assert films.histories.tolist() == [row for row, _ in expected]
    assert films.labels.tolist() == [float(event.rating >= 4) for _, event in expected]
    tokens = [films.input_ids[i][films.attention_mask[i] > 0].tolist() for i in films.films.tolist()]
    assert tokens == [[own.start, *own.films[event.item], own.end] for _, event in expected]


def test_a_score_depends_on_its_history_and_its_film_alone(clicks):
    """Not on the batch: not on padding, and not on the chunk that a film is in."""
    samples = list(clicks.samples(0, 1, HYPER))[:6]
    for arm in ARMS:
        model, own = writer(arm)
        together = ctr_sink.score(model, own, samples, HYPER)["scores"]
        by_length = sorted(samples, key=lambda s: len(s.history))
        alone = torch.cat([ctr_sink.score(model, own, [s], HYPER)["scores"] for s in by_length])
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)


def test_the_bias_is_the_only_difference_between_the_last_two_arms(clicks):
    samples = list(clicks.samples(0, 1, HYPER))[:2]
    (without, own), (with_bias, _) = writer(SINKS), writer(BIAS)
    scales = with_bias.bias_scales()
    assert len(scales) == ctr_sink.LAYERS and all(scale == 10 for scale in scales)
    assert all(scale == 0 for scale in without.bias_scales())
    text = own.histories(samples)
    assert not torch.allclose(with_bias.users(text), without.users(text), atol=1e-3)
    with torch.no_grad():
        for scale in scales:
            scale.zero_()
    torch.testing.assert_close(with_bias.users(text), without.users(text))


@pytest.mark.parametrize("arm", [NO_SINKS, SEPARATORS, BIAS])
def test_training(arm, clicks):
    row, tested = ctr_sink.train(arm, 0, HYPER, clicks, CPU)
    assert 0 <= row.validation <= 1 and tested["scores"].isfinite().all()
    assert len(tested["labels"]) == sum(len(s.targets) for s in clicks.split(HYPER)[2])
    assert 0 <= paired.value(ctr_sink.click_metrics(tested)["AUC"]) <= 1
    if arm == NO_SINKS:
        assert row.learned == {}
    else:
        assert row.learned["to sinks, before"] != row.learned["to sinks, after"]
        assert len(row.learned["to sinks, after"]) == 6
    if arm == BIAS:
        assert all(scale != 10 for scale in row.learned["bias scale"])
        again, tested_again = ctr_sink.train(arm, 0, HYPER, clicks, CPU)
        assert replace(again, epoch_seconds=row.epoch_seconds) == row
        assert torch.equal(tested_again["scores"], tested["scores"])

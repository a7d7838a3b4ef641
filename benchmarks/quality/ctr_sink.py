"""`python -m benchmarks.quality.ctr_sink`: CTR-Sink on MovieLens-100k as text: do sinks and their bias predict better?

MiniLM (22 million parameters) reads a user's last 16 ratings, each as "5 stars Toy Story months", and a film as title
and genres. A click is a rating of 4 or more. A history is read once for the user's next 16 films. The first 75% of each
user's ratings are for training, the next 5% for validation, the last 20% for the test. Four arms:

    no sinks             the ratings one after another
    [SEP]                the tokenizer's separator between two ratings
    sinks, no bias       a sink between two ratings; its embedding says how old the rating is. Two stages
    sinks with the bias  the same, with the learned bias between sinks in the first two layers

The user's vector is the mean over the tokens; with sinks, over the sinks in the first half of the training.
"""

import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import get_cosine_schedule_with_warmup

from benchmarks.data import minilm, movielens
from benchmarks.data.movielens import Event
from benchmarks.quality import experiment, paired
from benchmarks.quality.din import LIKED, click_metrics
from benchmarks.quality.experiment import Experiment, Trained
from benchmarks.quality.training import TrainingRow, batches_of_similar_lengths, count_parameters, timed_epoch
from recattn.inspect import SinkMass, sink_mass
from recattn.integrations.transformers import enable_sink_attention
from recattn.nn import SinkPooling, SinkTokenEmbedding, TwoStageSchedule
from recattn.nn.sink_tokens import SinkTokens, at_sinks, insert_sinks, replace_sink_embeddings

NO_SINKS, SEPARATORS, SINKS, BIAS = "no sinks", "[SEP]", "sinks, no bias", "sinks with the bias"
ARMS = (NO_SINKS, SEPARATORS, SINKS, BIAS)
LAYERS = 2  # with the bias; the official code's choice for BERT
SINK = "[unused0]"  # one of the free tokens in BERT's vocabulary
FEWEST = 4  # ratings in a history
TITLE_TOKENS, FILM_TOKENS, FILM_CHUNKS = 12, 16, 2
AGES = (("minutes", 3600), ("hours", 86400), ("days", 7 * 86400), ("weeks", 30 * 86400), ("months", math.inf))
INSPECTED = 64  # histories whose attention is measured


def fastest_dtype() -> str:
    """bfloat16 where the hardware multiplies it: GPUs, and CPUs with AMX."""
    return "bfloat16" if torch.cuda.is_available() or torch.cpu._is_amx_tile_supported() else "float32"


@dataclass(frozen=True)
class Hyperparameters:
    """The official code's, except fewer epochs, no dropout, and two learning rates.

    MiniLM's is tuned for each arm. `epochs` counts both stages: each lasts half of the steps.
    """

    behaviors: int = 16
    targets: int = 16
    batch: int = 16  # histories
    learning_rate: float = 2e-4  # of MiniLM
    new_learning_rate: float = 1e-3  # of what it did not have before
    weight_decay: float = 5e-5
    warmup: float = 0.05
    dtype: str = fastest_dtype()
    epochs: int = 1


# --- Data ---


class Sample(NamedTuple):
    """A history and the films that the user rated after it."""

    user: int
    history: list[Event]  # oldest first
    targets: list[Event]


@dataclass(frozen=True)
class Clicks:
    users: list[list[Event]]
    source: str

    def split(self, hyper: Hyperparameters) -> tuple[list[Sample], list[Sample], list[Sample]]:
        """Training, validation and test: the first 75% of each user's ratings, the next 5%, the last 20%."""
        return tuple([*self.samples(low, high, hyper)] for low, high in pairwise((0, 0.75, 0.8, 1)))

    def samples(self, low: float, high: float, hyper: Hyperparameters) -> Iterator[Sample]:
        """Of every user's ratings between two fractions, and after the first few."""
        for user, own in enumerate(self.users):
            stop = int(high * len(own))
            for start in range(max(FEWEST, int(low * len(own))), stop, hyper.targets):
                history = own[max(0, start - hyper.behaviors) : start]
                yield Sample(user, history, own[start : min(start + hyper.targets, stop)])


def load(offline: bool = False) -> Clicks:
    """Raises FileNotFoundError without the data: drawn titles say nothing."""
    users = movielens.events(offline)
    if users is None:
        raise FileNotFoundError(f"{movielens.CACHED}, MovieLens-100k, is not there and was not downloaded")
    return Clicks(users, "MovieLens-100k")


class Text(NamedTuple):
    """Token ids of a batch of histories. Sinks and separators have positions; without them these are [B, 0]."""

    input_ids: Tensor  # [B, N]
    attention_mask: Tensor  # [B, N]
    sink_positions: Tensor  # [B, M], padded with -1
    sink_ids: Tensor  # [B, M] buckets of the age


class Films(NamedTuple):
    """The distinct films of a batch, and which of them each history is asked about."""

    input_ids: Tensor  # [F, N]
    attention_mask: Tensor  # [F, N]
    histories: Tensor  # [S] row of the batch
    films: Tensor  # [S] row of input_ids
    labels: Tensor  # [S]


class Writer:
    """Writes histories and films as token ids."""

    def __init__(self, arm: str, sink_embedding: SinkTokenEmbedding) -> None:
        tokenizer = minilm.tokenizer()
        ids = lambda texts, longest: tokenizer(  # noqa: E731
            texts, add_special_tokens=False, truncation=True, max_length=longest
        )["input_ids"]
        films = movielens.items()
        titles = ids([film.title for film in films.values()], TITLE_TOKENS)
        whole = ids([f"{film.title} ({', '.join(film.genres)})" for film in films.values()], FILM_TOKENS)
        self.titles, self.films = dict(zip(films, titles, strict=True)), dict(zip(films, whole, strict=True))
        self.stars = [ids([f"{rating} stars"], None)[0] for rating in range(6)]
        self.ages = [ids([name], None)[0] for name, _ in AGES]
        self.start, self.end, self.padding = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
        self.sink = tokenizer.convert_tokens_to_ids(SINK)
        self.arm, self.sink_embedding = arm, sink_embedding

    def histories(self, samples: Sequence[Sample]) -> Text:
        nows = [sample.targets[0].time for sample in samples]
        written = [
            [self._rating(event, now - event.time) for event in sample.history]
            for sample, now in zip(samples, nows, strict=True)
        ]
        if self.arm == NO_SINKS:
            written = [[[token for rating in own for token in rating]] for own in written]  # one piece: nothing between
        tokens = self._tokens(written)
        longest = max(len(sample.history) for sample in samples)
        times = torch.zeros(len(samples), longest, dtype=torch.float64)
        present = torch.zeros(len(samples), longest, dtype=torch.bool)
        for row, sample in enumerate(samples):
            times[row, : len(sample.history)] = torch.tensor(
                [event.time for event in sample.history], dtype=torch.float64
            )
            present[row, : len(sample.history)] = True
        buckets = self.sink_embedding.time_ids(times, present, now=torch.tensor(nows, dtype=torch.float64))
        ids = tokens.input_ids
        if self.arm == SEPARATORS:
            ids = ids.masked_fill(ids == self.sink, self.end)
        return Text(ids, tokens.attention_mask, tokens.sink_positions, at_sinks(buckets, tokens.sink_behaviors))

    def targets(self, samples: Sequence[Sample]) -> Films:
        asked_for = {event.item for sample in samples for event in sample.targets}
        items = sorted(asked_for, key=lambda item: (len(self.films[item]), item))  # the shortest text first
        number = {item: row for row, item in enumerate(items)}
        asked = [(row, event) for row, sample in enumerate(samples) for event in sample.targets]
        text = self._tokens([[self.films[item]] for item in items])
        histories = torch.tensor([row for row, _ in asked])
        films = torch.tensor([number[event.item] for _, event in asked])
        labels = torch.tensor([float(event.rating >= LIKED) for _, event in asked])
        return Films(text.input_ids, text.attention_mask, histories, films, labels)

    def _tokens(self, written: Sequence[Sequence[list[int]]]) -> SinkTokens:
        ends = {"prefix_ids": [self.start], "suffix_ids": [self.end]}
        return insert_sinks(written, self.sink, **ends, pad_token_id=self.padding)

    def _rating(self, event: Event, age: float) -> list[int]:
        word = next(number for number, (_, limit) in enumerate(AGES) if age < limit)
        return [*self.stars[int(event.rating)], *self.titles[event.item], *self.ages[word]]


# --- Model ---


class ClickModel(nn.Module):
    """An MLP over the user's vector, the film's vector and their product, both from one language model."""

    def __init__(self, arm: str, hyper: Hyperparameters) -> None:
        super().__init__()
        self.encoder = minilm.model(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
        size = self.encoder.config.hidden_size
        self.head = nn.Sequential(nn.Linear(3 * size, 128), nn.GELU(), nn.Linear(128, 1))
        self.sink_embedding, self.pooling = SinkTokenEmbedding(size, "temporal"), SinkPooling()
        self.has_sinks, self.has_bias = arm in (SINKS, BIAS), arm == BIAS
        # In every arm, so that they differ in the bias and not in the kernels.
        enable_sink_attention(self.encoder, layers=LAYERS)
        if not self.has_bias:  # `mass` names the sinks of every arm
            for scale in self.bias_scales():
                nn.init.zeros_(scale)

    def bias_scales(self) -> list[nn.Parameter]:
        """The learned scalar of each layer's bias."""
        return [p for name, p in self.named_parameters() if name.endswith("sink_interaction.scale")]

    def embed(self, text: Text) -> Tensor:
        embeddings = self.encoder.get_input_embeddings()(text.input_ids)
        if not self.has_sinks:
            return embeddings
        return replace_sink_embeddings(embeddings, text.sink_positions, self.sink_embedding(text.sink_ids))

    def users(self, text: Text) -> Tensor:
        """[B, d]"""
        sinks = text.sink_positions if self.has_bias else no_sinks(text.input_ids)
        hidden = self.encode(text.attention_mask, sinks, inputs_embeds=self.embed(text))
        if not self.has_sinks:
            return self.pooling(hidden, text.attention_mask, stage="tokens")
        return self.pooling(hidden, text.attention_mask, text.sink_positions)

    def films(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[F, d]. In chunks of about the same length, as half of the tokens would be padding."""
        vectors = []
        for ids, mask in zip(input_ids.chunk(FILM_CHUNKS), attention_mask.chunk(FILM_CHUNKS), strict=True):
            longest = int(mask.sum(1).max())
            ids, mask = ids[:, :longest], mask[:, :longest]
            hidden = self.encode(mask, no_sinks(ids), input_ids=ids)
            vectors.append(self.pooling(hidden, mask, stage="tokens"))
        return torch.cat(vectors)

    def encode(self, mask: Tensor, sink_positions: Tensor, **tokens: Tensor) -> Tensor:
        return self.encoder(attention_mask=mask, sink_positions=sink_positions, **tokens).last_hidden_state

    def click(self, users: Tensor, films: Tensor) -> Tensor:
        """[S, d] each -> logits [S]"""
        return self.head(torch.cat([users, films, users * films], dim=1)).squeeze(1).float()


def no_sinks(input_ids: Tensor) -> Tensor:
    return input_ids.new_full((len(input_ids), 1), -1)


def to(device: torch.device, batch: NamedTuple):
    return type(batch)(*(x.to(device) for x in batch))


# --- Training and test ---


def parameter_groups(model: nn.Module, known_rate: float, new_rate: float) -> list[dict]:
    """A learning rate for what `model.encoder` was pretrained with, and one for all else."""
    known = [p for name, p in model.named_parameters() if name.startswith("encoder") and "sink_interaction" not in name]
    ids = {id(p) for p in known}
    new = [p for p in model.parameters() if id(p) not in ids]
    return [{"params": known, "lr": known_rate}, {"params": new, "lr": new_rate}]


def fit(model: ClickModel, writer: Writer, samples: Sequence[Sample], seed: int, hyper: Hyperparameters) -> list[float]:
    """Train both stages with one optimizer and one schedule. Returns the seconds of each epoch."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([len(sample.history) for sample in samples])
    steps = hyper.epochs * math.ceil(len(samples) / hyper.batch)
    stages = TwoStageSchedule(model.pooling, sink_steps=steps // 2)
    groups = parameter_groups(model, hyper.learning_rate, hyper.new_learning_rate)
    optimizer = torch.optim.AdamW(groups, weight_decay=hyper.weight_decay, fused=True)
    rate = get_cosine_schedule_with_warmup(optimizer, int(hyper.warmup * steps), steps)
    seconds: list[float] = []
    model.train()
    for _ in range(hyper.epochs):
        with timed_epoch(seconds):
            for chosen in batches_of_similar_lengths(lengths, hyper.batch, generator):
                batch = [samples[i] for i in chosen.tolist()]
                text, films = to(device, writer.histories(batch)), to(device, writer.targets(batch))
                with autocast(device, hyper):
                    users, vectors = model.users(text), model.films(films.input_ids, films.attention_mask)
                    logits = model.click(users[films.histories], vectors[films.films])
                loss = F.binary_cross_entropy_with_logits(logits, films.labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
                stages.step()
    return seconds


def autocast(device: torch.device, hyper: Hyperparameters):
    return torch.autocast(device.type, torch.bfloat16, enabled=hyper.dtype == "bfloat16")


@torch.no_grad()
def score(model: ClickModel, writer: Writer, samples: Sequence[Sample], hyper: Hyperparameters) -> dict[str, Tensor]:
    """Logits, labels and users of every target, [S] each; users are numbered from 0."""
    device = next(model.parameters()).device
    model.eval()
    by_length = sorted(samples, key=lambda sample: len(sample.history))
    scores, labels, users = [], [], []
    for first in range(0, len(by_length), 4 * hyper.batch):
        batch = by_length[first : first + 4 * hyper.batch]
        text, films = to(device, writer.histories(batch)), to(device, writer.targets(batch))
        with autocast(device, hyper):
            vectors, of_films = model.users(text), model.films(films.input_ids, films.attention_mask)
            scores.append(model.click(vectors[films.histories], of_films[films.films]).cpu())
        labels.append(films.labels.cpu())
        users.append(torch.tensor([batch[row].user for row in films.histories.tolist()]))
    _, numbers = torch.cat(users).unique(return_inverse=True)
    return {"scores": torch.cat(scores), "labels": torch.cat(labels), "users": numbers}


def mass(model: ClickModel, text: Text) -> SinkMass:
    """How much attention the tokens between two ratings get."""
    model.eval()
    with torch.no_grad():
        inputs = {"inputs_embeds": model.embed(text), "attention_mask": text.attention_mask}
    return sink_mass(model.encoder, inputs, sink_positions=text.sink_positions)


def curves(when: str, measured: SinkMass) -> dict[str, list[float]]:
    """[layers], mean over histories and heads."""
    named = {"to sinks": measured.to_sinks, "among sinks": measured.among_sinks}
    return {f"{name}, {when}": [round(x, 5) for x in own.nanmean((1, 2)).tolist()] for name, own in named.items()}


def train(arm: str, seed: int, hyper: Hyperparameters, clicks: Clicks, device: torch.device) -> Trained:
    training, validation, test = clicks.split(hyper)
    torch.manual_seed(seed)
    model = ClickModel(arm, hyper).to(device)
    writer = Writer(arm, model.sink_embedding)
    inspected = to(device, writer.histories([s for s in test if len(s.history) == hyper.behaviors][:INSPECTED]))
    has_sinks = arm != NO_SINKS
    learned = curves("before", mass(model, inspected)) if has_sinks else {}
    seconds = fit(model, writer, training, seed, hyper)
    if has_sinks:
        after = mass(model, inspected)
        learned |= curves("after", after)
        learned["to sinks, uniform"] = [round(x, 5) for x in after.uniform_to_sinks.mean(1).tolist()]
        learned["among sinks, uniform"] = [round(x, 5) for x in after.uniform_among_sinks.nanmean(1).tolist()]
    if arm == BIAS:
        learned["bias scale"] = [round(scale.item(), 4) for scale in model.bias_scales()]
    validated = score(model, writer, validation, hyper)
    row = TrainingRow(
        parameters=count_parameters(model),
        validation=paired.value(click_metrics(validated)["AUC"]),
        best_epoch=hyper.epochs,
        epoch_seconds=statistics.median(seconds),
        learned=learned,
    )
    return Trained(row, score(model, writer, test, hyper))


# --- The experiment ---


def search(arm: str) -> dict[str, Sequence[object]]:
    return {"learning_rate": (1e-4, 2e-4, 4e-4)}


EXPERIMENT = Experiment(
    name="ctr_sink",
    op="sink_attention",
    arms=ARMS,
    hyper=Hyperparameters(),
    search=search,
    comparisons=((SEPARATORS, NO_SINKS), (SINKS, NO_SINKS), (BIAS, NO_SINKS), (SINKS, SEPARATORS), (BIAS, SINKS)),
    load=load,
    train=train,
    metrics=click_metrics,
    budget=3,
    seeds=5,
)


if __name__ == "__main__":
    sys.exit(experiment.main(EXPERIMENT, None, __doc__))

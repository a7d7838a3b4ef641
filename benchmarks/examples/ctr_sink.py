"""CTR-Sink in a language model: will a user like a film, judged by the titles seen before?

    python -m benchmarks.examples.ctr_sink [--quick] [--steps 200]

MiniLM (22 million parameters) reads the titles of a user's last films with a sink after each. The sink's embedding says
how long ago that film was rated. `enable_sink_attention` adds the learned bias between sinks to the first layers. The
model is fine-tuned on MovieLens-100k in CTR-Sink's two stages: pooled over the sinks, then over all tokens. Each user's
newest ratings are the test. The same model without the bias is trained on the same batches. Two minutes are too few
steps for the AUCs to differ; `--steps` sets more.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.data import minilm, movielens
from benchmarks.data.movielens import Event
from benchmarks.quality import paired
from benchmarks.quality.ctr_sink import LAYERS, SINK, parameter_groups
from benchmarks.quality.din import LIKED
from recattn.inspect import sink_mass
from recattn.integrations.transformers import enable_sink_attention
from recattn.nn import SinkPooling, SinkTokenEmbedding, TwoStageSchedule
from recattn.nn.sink_tokens import at_sinks, insert_sinks, replace_sink_embeddings


@dataclass(frozen=True)
class Settings:
    behaviors: int = 10
    batch: int = 16
    steps: int = 14  # per stage
    tests: int = 384
    seed: int = 0


class Sample(NamedTuple):
    history: list[Event]  # oldest first
    target: Event


def samples(behaviors: int) -> tuple[list[Sample], list[Sample]]:
    """Training samples from the first 90% of each user's ratings, test samples from the rest."""
    users = movielens.events()
    if users is None:
        raise FileNotFoundError(f"{movielens.CACHED}, MovieLens-100k, is not there and could not be downloaded")
    train, test = [], []
    for events in users:
        for i in range(2, len(events)):
            own = test if i >= 0.9 * len(events) else train
            own.append(Sample(events[max(0, i - behaviors) : i], events[i]))
    return train, test


class Prompts:
    """Turns samples into token ids: the history with sinks, and the film in question."""

    def __init__(self, tokenizer, sink_embedding: SinkTokenEmbedding) -> None:
        titles = {item: f"{film.title} ({', '.join(film.genres)})" for item, film in movielens.items().items()}
        ids = tokenizer(list(titles.values()), add_special_tokens=False, truncation=True, max_length=16)["input_ids"]
        self.titles = dict(zip(titles, ids, strict=True))
        opinions = tokenizer(["disliked", "liked"], add_special_tokens=False)["input_ids"]
        self.opinions: list[list[int]] = opinions
        self.start, self.end = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
        self.sink_id, self.padding_id = tokenizer.convert_tokens_to_ids(SINK), tokenizer.pad_token_id
        self.sink_embedding = sink_embedding

    def batch(self, chosen: Sequence[Sample]) -> tuple[dict[str, Tensor], Tensor]:
        """The inputs of the model, and the labels."""
        behaviors = [[[*self.opinions[e.rating >= LIKED], *self.titles[e.item]] for e in s.history] for s in chosen]
        ends = {"prefix_ids": self.start, "suffix_ids": self.end, "pad_token_id": self.padding_id}
        history = insert_sinks(behaviors, self.sink_id, **ends)
        film = insert_sinks([[self.titles[s.target.item]] for s in chosen], self.sink_id, **ends)
        longest = max(len(s.history) for s in chosen)
        times = [[e.time for e in s.history] + [0.0] * (longest - len(s.history)) for s in chosen]
        present = torch.arange(longest) < torch.tensor([[len(s.history)] for s in chosen])
        seconds, now = (torch.tensor(x, dtype=torch.float64) for x in (times, [s.target.time for s in chosen]))
        ids = self.sink_embedding.time_ids(seconds, present, now=now)
        inputs = {
            "input_ids": history.input_ids,
            "attention_mask": history.attention_mask,
            "sink_positions": history.sink_positions,
            "sink_ids": at_sinks(ids, history.sink_behaviors),
            "film_ids": film.input_ids,
            "film_mask": film.attention_mask,
        }
        return inputs, torch.tensor([float(s.target.rating >= LIKED) for s in chosen])


class ClickModel(nn.Module):
    """An MLP over the user's vector, the film's vector and their product, both from one language model."""

    def __init__(self, encoder: nn.Module, sink_embedding: SinkTokenEmbedding, with_bias: bool) -> None:
        super().__init__()
        size = encoder.config.hidden_size
        self.encoder, self.sink_embedding, self.pooling = encoder, sink_embedding, SinkPooling()
        self.head = nn.Sequential(nn.Linear(3 * size, 64), nn.GELU(), nn.Linear(64, 1))
        self.handle = enable_sink_attention(encoder, layers=LAYERS) if with_bias else None

    def embed(self, input_ids: Tensor, sink_positions: Tensor, sink_ids: Tensor) -> Tensor:
        embeddings = self.encoder.get_input_embeddings()(input_ids)
        return replace_sink_embeddings(embeddings, sink_positions, self.sink_embedding(sink_ids))

    def encode(self, mask: Tensor, sink_positions: Tensor, **tokens: Tensor) -> Tensor:
        named = {} if self.handle is None else {"sink_positions": sink_positions}
        return self.encoder(attention_mask=mask, **tokens, **named).last_hidden_state

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        sink_positions: Tensor,
        sink_ids: Tensor,
        film_ids: Tensor,
        film_mask: Tensor,
    ) -> Tensor:
        """[B] logits of a like."""
        embeddings = self.embed(input_ids, sink_positions, sink_ids)
        hidden = self.encode(attention_mask, sink_positions, inputs_embeds=embeddings)
        user = self.pooling(hidden, attention_mask, sink_positions)
        no_sinks = torch.full_like(sink_positions[:, :1], -1)
        film = self.pooling(self.encode(film_mask, no_sinks, input_ids=film_ids), film_mask, stage="tokens")
        return self.head(torch.cat([user, film, user * film], dim=1)).squeeze(1)


@torch.no_grad()
def evaluate(model: ClickModel, prompts: Prompts, test: Sequence[Sample], batch: int) -> float:
    model.eval()
    scores, labels = [], []
    for first in range(0, len(test), batch):
        inputs, liked = prompts.batch(test[first : first + batch])
        scores.append(model(**inputs))
        labels.append(liked)
    everyone = torch.zeros(len(test), dtype=torch.long)
    return paired.value(paired.area_under_curve(torch.cat(scores), torch.cat(labels), everyone))


def train(model: ClickModel, prompts: Prompts, samples: Sequence[Sample], settings: Settings) -> list[float]:
    """Train both stages with one optimizer and one cosine schedule, like the official code. Returns the losses."""
    schedule = TwoStageSchedule(model.pooling, sink_steps=settings.steps)
    optimizer = torch.optim.AdamW(parameter_groups(model, known_rate=3e-5, new_rate=1e-3), weight_decay=5e-5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * settings.steps)
    generator = torch.Generator().manual_seed(settings.seed)
    losses = []
    model.train()
    for _ in range(2 * settings.steps):
        chosen = torch.randint(len(samples), (settings.batch,), generator=generator).tolist()
        inputs, liked = prompts.batch([samples[i] for i in chosen])
        loss = F.binary_cross_entropy_with_logits(model(**inputs), liked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosine.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def mass_at_sinks(model: ClickModel, inputs: dict[str, Tensor]) -> Tensor:
    """[layers] share of a token's attention that goes to sinks."""
    embeddings = model.embed(inputs["input_ids"], inputs["sink_positions"], inputs["sink_ids"])
    batch = {"inputs_embeds": embeddings.detach(), "attention_mask": inputs["attention_mask"]}
    return sink_mass(model.encoder, batch, sink_positions=inputs["sink_positions"]).to_sinks.mean(dim=(1, 2))


def run(settings: Settings, console: Console) -> dict[str, dict[str, object]]:
    """Train and test the model with and without the bias."""
    tokenizer = minilm.tokenizer()
    train_samples, test_samples = samples(settings.behaviors)
    order = torch.randperm(len(test_samples), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    test_samples = [test_samples[i] for i in order[: settings.tests]]
    results = {}
    for name in ("sinks with the bias", "sinks without"):
        torch.manual_seed(settings.seed)
        sink_embedding = SinkTokenEmbedding(384, "temporal")
        # A CPU has no fused attention kernel with dropout.
        encoder = minilm.model(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
        model = ClickModel(encoder, sink_embedding, with_bias=name == "sinks with the bias")
        prompts = Prompts(tokenizer, sink_embedding)
        inputs, _ = prompts.batch(test_samples[: settings.batch])
        before = mass_at_sinks(model, inputs)
        started = time.perf_counter()
        losses = train(model, prompts, train_samples, settings)
        seconds = (time.perf_counter() - started) / len(losses)
        results[name] = {
            "auc": evaluate(model, prompts, test_samples, 2 * settings.batch),
            "losses": losses,
            "seconds": seconds,
            "mass": (before, mass_at_sinks(model, inputs)),
        }
    table = Table(title=f"MiniLM on MovieLens-100k: 2 × {settings.steps} steps of {settings.batch}")
    third = settings.steps // 3 or 1
    for column in ("", "loss: first", "end of stage 1", "end of stage 2", "AUC", "s per step", "attention to sinks, %"):
        table.add_column(column)
    for name, r in results.items():
        losses = torch.tensor(r["losses"])
        ends = losses[:third], losses[settings.steps - third : settings.steps], losses[-third:]
        mass = " → ".join(f"{100 * m.mean():.1f}" for m in r["mass"])
        row = [*(f"{x.mean():.3f}" for x in ends), f"{r['auc']:.3f}", f"{r['seconds']:.2f}", mass]
        table.add_row(name, *row)
    console.print(table)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.examples.ctr_sink", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="two steps per stage, to see it run")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="per stage, %(default)s by default")
    chosen = parser.parse_args(arguments)
    quick = Settings(behaviors=5, batch=4, steps=2, tests=16)
    run(quick if chosen.quick else Settings(steps=chosen.steps), Console())


if __name__ == "__main__":
    main()

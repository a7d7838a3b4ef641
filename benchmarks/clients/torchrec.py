"""A ranker on TorchRec's EmbeddingCollection by its TrainPipelineBase: the history's mean, LREA, or sink attention.

Each rating is a sample: is it 4 or more, given the movie and the movies rated before (at most 200)? The last tenth of
each user's ratings is the test. Histories stay jagged from the features to the output.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics.functional.classification import binary_auroc
from torchrec import EmbeddingCollection, EmbeddingConfig, JaggedTensor, KeyedJaggedTensor
from torchrec.distributed.train_pipeline import TrainPipelineBase
from torchrec.streamable import Pipelineable

from benchmarks.clients.comparison import Outcome, compare
from benchmarks.data import movielens
from recattn.integrations.torchrec import JaggedLREA, JaggedSinkAttention
from recattn.nn import LREA, SinkAttention

LENGTH, DIM, HEADS, RANK, EPOCHS, BATCH = 200, 16, 2, 8, 2, 512
SINK_EVERY = 20  # behaviours
LIKED = 4  # the lowest rating that counts as liked
CPU = torch.device("cpu")


@dataclass
class Batch(Pipelineable):
    features: KeyedJaggedTensor
    liked: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return Batch(self.features.to(device, non_blocking), self.liked.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        self.features.record_stream(stream)
        self.liked.record_stream(stream)


class Mean(nn.Module):
    """The mean of each user's behaviours."""

    def forward(self, item: Tensor, history: JaggedTensor) -> Tensor:
        lengths = history.lengths()
        users = torch.arange(len(lengths)).repeat_interleave(lengths)
        sums = item.new_zeros(len(lengths), DIM).index_add(0, users, history.values())
        return sums / lengths.clamp(min=1)[:, None]


class Attended(Mean):
    """The mean after a self-attention in which every 20th behaviour is a sink, with a learned bias between them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = JaggedSinkAttention(SinkAttention(DIM, HEADS))
        self.bias = nn.Parameter(torch.zeros(HEADS, LENGTH // SINK_EVERY, LENGTH // SINK_EVERY))

    def forward(self, item: Tensor, history: JaggedTensor) -> Tensor:
        lengths = history.lengths()
        positions = torch.arange(0, LENGTH, SINK_EVERY)
        positions = positions.where(positions < lengths[:, None], -1)
        bias = self.bias.expand(len(lengths), -1, -1, -1)
        return super().forward(item, self.attention(history, sink_positions=positions, inter_sink_bias=bias))


class Ranker(nn.Module):
    """The rest of the model. Returns the loss and, as TorchRec's pipelines expect, what else the caller wants."""

    def __init__(self, interest: nn.Module) -> None:
        super().__init__()
        names = {"user": (944, ["user"]), "movie": (movielens.ITEMS + 1, ["movie", "history"])}
        tables = [
            EmbeddingConfig(name=name, embedding_dim=DIM, num_embeddings=rows, feature_names=features)
            for name, (rows, features) in names.items()
        ]
        self.embeddings, self.interest = EmbeddingCollection(tables=tables, device=CPU), interest
        self.mlp = nn.Sequential(nn.Linear(4 * DIM, 64), nn.ReLU(), nn.Linear(64, 1))
        for parameter in self.embeddings.parameters():
            nn.init.normal_(parameter, std=0.01)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        embeddings = self.embeddings(batch.features)
        user, item = embeddings["user"].values(), embeddings["movie"].values()
        interest = self.interest(item, embeddings["history"])
        scores = self.mlp(torch.cat([user, item, interest, interest * item], dim=1)).squeeze(1)
        return F.binary_cross_entropy_with_logits(scores, batch.liked), scores.detach()


def main() -> None:
    train_samples, test_samples = read_samples()

    def train(interest: Callable[[], nn.Module]) -> Outcome:
        torch.manual_seed(0)
        model = Ranker(interest())
        pipeline = TrainPipelineBase(model, torch.optim.Adam(model.parameters(), 3e-3, weight_decay=1e-5), CPU)
        epochs = (batches(train_samples, torch.randperm(len(train_samples))) for _ in range(EPOCHS))
        rows = itertools.chain.from_iterable(epochs)
        began = time.process_time()
        with contextlib.suppress(StopIteration):  # how a pipeline ends
            while True:
                pipeline.progress(rows)
        seconds = (time.process_time() - began) / EPOCHS
        return Outcome(seconds, test_auc(model, test_samples))

    attentions = {f"LREA, rank {RANK}": lambda: JaggedLREA(LREA(DIM, LENGTH, RANK)), "sink attention": Attended}
    for attention, interest in attentions.items():
        compare(
            lambda ours, interest=interest: train(interest if ours else Mean),
            library="TorchRec",
            package="torchrec",
            model="mean of the history",
            attention=attention,
            epochs=EPOCHS,
            metric="test AUC",
        )


@torch.no_grad()
def test_auc(model: nn.Module, samples: list) -> float:
    model.eval()
    scores = [model(batch)[1] for batch in batches(samples, torch.arange(len(samples)))]
    liked = torch.tensor([sample[-1] for sample in samples]).long()
    return float(binary_auroc(torch.cat(scores), liked))


def read_samples() -> tuple[list, list]:
    """(user, movie, earlier movies, liked) of each rating, to train and to test."""
    train, test = [], []
    for user, events in enumerate(movielens.events()):
        movies = torch.tensor([event.item for event in events])
        for i, event in enumerate(events):
            sample = user, event.item, movies[max(0, i - LENGTH) : i], event.rating >= LIKED
            (train if i < 0.9 * len(events) else test).append(sample)
    return train, test


def batches(samples: list, order: Tensor) -> Iterator[Batch]:
    for rows in order.split(BATCH):
        users, movies, histories, liked = zip(*(samples[row] for row in rows.tolist()), strict=True)
        ones = torch.ones(len(rows), dtype=torch.int64)
        lengths = torch.tensor([len(history) for history in histories])
        values = torch.cat([torch.tensor(users), torch.tensor(movies), *histories])
        features = KeyedJaggedTensor(["user", "movie", "history"], values, lengths=torch.cat([ones, ones, lengths]))
        yield Batch(features, torch.tensor(liked).float())


if __name__ == "__main__":
    main()

"""torch-rechub's DIN by its CTRTrainer, and with LREA in place of its activation units.

Each rating is a sample: is it 4 or more, given the movie and the movies rated before (at most 50)? The last tenth of
each user's ratings is the test.
"""

import time

import torch
from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.models.ranking import DIN
from torch_rechub.trainers import CTRTrainer
from torch_rechub.utils.data import DataGenerator

from benchmarks.clients.comparison import Outcome, compare
from benchmarks.data import movielens
from recattn.integrations.torch_rechub import replace_attention

LENGTH, DIM, RANK, EPOCHS, BATCH = 50, 16, 8, 2, 512
LIKED = 4  # the lowest rating that counts as liked


def main() -> None:
    splits = [as_tensors(samples) for samples in read_samples()]

    def train(with_lrea: bool) -> Outcome:
        torch.manual_seed(0)
        model = build()
        if with_lrea:
            replace_attention(model, LENGTH, RANK)
        (train_x, train_y), (test_x, test_y) = splits
        train_loader, _, test_loader = DataGenerator(train_x, train_y).generate_dataloader(
            test_x, test_y, test_x, test_y, batch_size=BATCH
        )
        trainer = CTRTrainer(model, optimizer_params={"lr": 3e-3, "weight_decay": 1e-5}, n_epoch=EPOCHS)
        began = time.process_time()
        trainer.fit(train_loader)
        seconds = (time.process_time() - began) / EPOCHS
        return Outcome(seconds, trainer.evaluate(model, test_loader))

    compare(
        train,
        library="torch-rechub",
        package="torch-rechub",
        model="DIN",
        attention=f"LREA, rank {RANK}",
        epochs=EPOCHS,
        metric="test AUC",
    )


def read_samples() -> tuple[list, list]:
    """(user, movie, earlier movies, liked) of each rating, to train and to test."""
    train, test = [], []
    for user, events in enumerate(movielens.events()):
        movies = [event.item for event in events]
        for i, event in enumerate(events):
            sample = user, event.item, movies[max(0, i - LENGTH) : i], event.rating >= LIKED
            (train if i < 0.9 * len(events) else test).append(sample)
    return train, test


def as_tensors(samples: list) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Features by name, histories padded with 0, and labels."""
    users, movies, histories, liked = zip(*samples, strict=True)
    padded = torch.tensor([history + [0] * (LENGTH - len(history)) for history in histories])
    features = {"user": torch.tensor(users), "movie": torch.tensor(movies), "history": padded}
    return features, torch.tensor(liked).float()


def build() -> DIN:
    movie = {"vocab_size": movielens.ITEMS + 1, "embed_dim": DIM, "padding_idx": 0}
    return DIN(
        features=[SparseFeature("user", vocab_size=943, embed_dim=DIM)],
        history_features=[SequenceFeature("history", pooling="concat", shared_with="movie", **movie)],
        target_features=[SparseFeature("movie", **movie)],
        mlp_params={"dims": [64, 32]},
        attention_mlp_params={"dims": [36]},
    )


if __name__ == "__main__":
    main()

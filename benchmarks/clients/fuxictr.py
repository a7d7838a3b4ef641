"""FuxiCTR's DIN and TransAct by BaseModel.fit, and with LREA or refined attention in place of theirs.

The models, their data loader and the layout of the data are those of model_zoo.LongCTR, which FuxiCTR's wheel includes.
Each rating is a sample: is it 4 or more, given the movie and the movies rated before (at most 50)? The last tenth of
each user's ratings is the test, on which FuxiCTR chooses the epoch.
"""

import time
from pathlib import Path
from typing import Any

import polars
from fuxictr.features import FeatureMap
from fuxictr.preprocess import FeatureProcessor, build_dataset
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.torch_utils import seed_everything
from model_zoo.LongCTR import DIN, TransAct
from model_zoo.LongCTR.longctr_dataloader import LongCTRDataLoader

from benchmarks.clients.comparison import Outcome, compare
from benchmarks.data import movielens
from recattn.integrations.fuxictr import refine_self_attention, replace_target_attention

LENGTH, DIM, RANK, EPOCHS, BATCH = 50, 16, 8, 2, 512
LIKED = 4  # the lowest rating that counts as liked
MECHANISM = "simple"
FOLDER = Path("data")
SETTINGS = {
    "dataset_id": "ml-100k",
    "data_root": str(FOLDER),
    "rebuild_dataset": False,  # ids are ids of FuxiCTR already
    "train_data": str(FOLDER / "train"),
    "valid_data": str(FOLDER / "test"),
    "user_info": str(FOLDER / "users.parquet"),
    "item_info": str(FOLDER / "movies.parquet"),
    "data_loader": LongCTRDataLoader,
    "feature_cols": [
        {"name": ["user_index", "item_index", "seq_len"], "active": True, "dtype": "int", "type": "meta"},
        {"name": "user", "active": True, "dtype": "int", "type": "categorical", "vocab_size": 945},
        {
            "name": "movie",
            "active": True,
            "dtype": "int",
            "type": "categorical",
            "source": "item",
            "vocab_size": movielens.ITEMS + 2,
        },
    ],
    "label_col": {"name": "liked", "dtype": "int"},
    "task": "binary_classification",
    "loss": "binary_crossentropy",
    "optimizer": "adam",
    "metrics": ["AUC"],
    "model_root": str(FOLDER / "checkpoints"),
    "verbose": 0,
    "num_workers": 0,
    "max_len": LENGTH,
    "batch_size": BATCH,
    "embedding_dim": DIM,
    "learning_rate": 3e-3,
    "epochs": EPOCHS,
}
DIN_SIZES = {"dnn_hidden_units": [64, 32], "attention_hidden_units": [36]}
TRANSACT_SIZES = {"dcn_hidden_units": [64, 32], "dim_feedforward": 64}


def main() -> None:
    write_data()
    shared = {"library": "FuxiCTR", "package": "fuxictr", "epochs": EPOCHS, "metric": "test AUC"}
    compare(
        lambda with_lrea: train(DIN, DIN_SIZES, with_lrea and (lambda m: replace_target_attention(m, LENGTH, RANK))),
        model="DIN",
        attention=f"LREA, rank {RANK}",
        **shared,
    )
    refine = lambda model: refine_self_attention(model, LENGTH, mechanism=MECHANISM)  # noqa: E731
    compare(
        lambda refined: train(TransAct, TRANSACT_SIZES, refined and refine),
        model="TransAct",
        attention=f"refined, {MECHANISM}",
        **shared,
    )


def train(kind: type, sizes: dict[str, Any], change: Any) -> Outcome:
    settings = SETTINGS | sizes
    seed_everything(0)
    encoder = FeatureProcessor(**settings)
    settings["train_data"], settings["valid_data"], _ = build_dataset(encoder, **settings)
    features = FeatureMap(settings["dataset_id"], encoder.data_dir)
    features.load(encoder.json_file, settings)
    train_batches, test_batches = RankDataLoader(features, stage="train", **settings)
    model = kind(features, **settings)
    Path(model.model_dir).mkdir(parents=True, exist_ok=True)
    if change:
        change(model)
    began = time.process_time()
    model.fit(train_batches, validation_data=test_batches, **settings)
    seconds = (time.process_time() - began) / EPOCHS
    return Outcome(seconds, float(model.evaluate(test_batches)["AUC"]))


def write_data() -> None:
    """The tables of model_zoo.LongCTR: samples, the movies of each user in time order, and the features of movies.

    A sample has the rows of its user and movie in the other two, and how many of the user's movies came before it. Row
    0 is padding.
    """
    FOLDER.mkdir()
    users = movielens.events()
    samples = {"train": [], "test": []}
    for user, events in enumerate(users):
        for i, event in enumerate(events):
            split = "train" if i < 0.9 * len(events) else "test"
            samples[split].append((user, event.item, i, user + 1, int(event.rating >= LIKED)))
    columns = ["user_index", "item_index", "seq_len", "user", "liked"]
    for split, rows in samples.items():
        polars.DataFrame(rows, schema=columns, orient="row").write_parquet(FOLDER / f"{split}.parquet")
    sequences = [[event.item for event in events] for events in users]
    polars.DataFrame({"full_item_seq": sequences}).write_parquet(FOLDER / "users.parquet")
    movies = list(range(movielens.ITEMS + 1))
    polars.DataFrame({"item_index": movies, "movie": movies}).write_parquet(FOLDER / "movies.parquet")


if __name__ == "__main__":
    main()

"""RecTools' SASRecModel by its fit, and with refined layers: the last movie of each user is the test."""

import time

import pandas as pd
import pytorch_lightning
from rectools import Columns
from rectools.dataset import Dataset
from rectools.metrics import NDCG, calc_metrics
from rectools.models import SASRecModel

from benchmarks.clients.comparison import Outcome, compare
from benchmarks.data import movielens
from recattn.integrations.rectools import RefinedSASRecLayers

LENGTH, EPOCHS, MECHANISM = 50, 5, "value"
REFINED = {
    "transformer_layers_type": RefinedSASRecLayers,
    "transformer_layers_kwargs": {"max_len": LENGTH, "mechanism": MECHANISM},
}


def main() -> None:
    earlier, last = read_interactions()
    compare(
        lambda refined: train(earlier, last, refined),
        library="RecTools",
        package="rectools",
        model="SASRec",
        attention=f"refined, {MECHANISM}",
        epochs=EPOCHS,
        metric="test NDCG@10",
    )


def read_interactions() -> tuple[pd.DataFrame, pd.DataFrame]:
    """All interactions of each user but the last, and the last."""
    columns = [Columns.User, Columns.Item, Columns.Weight, Columns.Datetime]
    rows = [(user, e.item, 1.0, e.time) for user, events in enumerate(movielens.events()) for e in events]
    interactions = pd.DataFrame(rows, columns=columns)
    interactions[Columns.Datetime] = pd.to_datetime(interactions[Columns.Datetime], unit="s")
    is_last = ~interactions[Columns.User].duplicated(keep="last")
    return interactions[~is_last], interactions[is_last]


def train(earlier: pd.DataFrame, last: pd.DataFrame, refined: bool) -> Outcome:
    pytorch_lightning.seed_everything(0)
    dataset = Dataset.construct(earlier)
    model = SASRecModel(
        session_max_len=LENGTH,
        n_factors=32,
        n_heads=2,
        n_blocks=2,
        batch_size=32,
        lr=3e-3,
        epochs=EPOCHS,
        deterministic=True,
        recommend_torch_device="cpu",
        **(REFINED if refined else {}),
    )
    began = time.process_time()
    model.fit(dataset)
    seconds = (time.process_time() - began) / EPOCHS
    recommended = model.recommend(last[Columns.User].unique(), dataset, k=10, filter_viewed=True)
    ndcg = NDCG(k=10, divide_by_achievable=True)  # by default RecTools divides by the gain of ten right movies
    return Outcome(seconds, float(calc_metrics({"ndcg": ndcg}, recommended, last)["ndcg"]))


if __name__ == "__main__":
    main()

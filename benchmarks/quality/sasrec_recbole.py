"""`python -m benchmarks.quality.sasrec_recbole`: RecBole's SASRec by RecBole's trainer, plain and refined.

A check on `benchmarks.quality.sasrec`: model, loss (cross-entropy over all items), sampling (every prefix of a history
is a sample) and early stopping are RecBole's; split, ranking and metrics are ours. RecBole has no STOSA.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from benchmarks import ROOT
from benchmarks.data import movielens
from benchmarks.data.movielens import Histories
from benchmarks.quality import experiment
from benchmarks.quality.experiment import Experiment, Trained
from benchmarks.quality.sasrec import PLAIN, TESTED, Split, evaluate, ranking_metrics
from benchmarks.quality.training import TrainingRow, count_parameters

ARMS = (PLAIN, "simple")
NAME = "ordered"


@dataclass(frozen=True)
class Hyperparameters:
    length: int = 50
    dim: int = 50
    heads: int = 1
    blocks: int = 2
    dropout: float = 0.5  # RecBole's
    batch: int = 512  # prefixes
    learning_rate: float = 1e-3  # RecBole's
    patience: int = 3
    epochs: int = 10


def write(histories: Histories, folder: Path) -> None:
    """The histories as RecBole reads them, up to the first item of the test, which RecBole leaves out. The time of an
    event is its number: ties in time keep our order."""
    rows = ["user_id:token\titem_id:token\ttimestamp:float"]
    rows += [
        f"{user}\t{item}\t{number}"
        for user, own in enumerate(histories.items)
        for number, item in enumerate(own[: len(own) - TESTED + 1].tolist())
    ]
    (folder / NAME).mkdir()
    (folder / NAME / f"{NAME}.inter").write_text("\n".join(rows) + "\n")


class Scores(nn.Module):
    """RecBole's model as `evaluate` asks for it: items by our numbers, padded on the left."""

    def __init__(self, model: nn.Module, numbers: Tensor) -> None:
        super().__init__()
        self.model, self.numbers = model, numbers  # [items + 1] RecBole's number of an item, 0 if it has none

    def scores(self, sequences: Tensor) -> Tensor:
        """[B, N] -> [B, items + 1]"""
        numbers = self.numbers[sequences]
        order = (numbers == 0).sort(dim=1, stable=True).indices  # padding and items that RecBole never saw come last
        scores = self.model(numbers.gather(1, order), (numbers != 0).sum(1)) @ self.model.item_embedding.weight.T
        return scores[:, self.numbers]


def train(arm: str, seed: int, hyper: Hyperparameters, histories: Histories, device: torch.device) -> Trained:
    # RecBole's checkpoints hold more than tensors, which torch.load refuses by default since torch 2.6.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    from recattn.integrations.recbole import patch_recbole

    began_in = Path.cwd()
    with TemporaryDirectory() as name:
        os.chdir(name)  # where RecBole writes its logs
        write(histories, Path(name))
        settings = {
            "data_path": name,
            "checkpoint_dir": name,
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
            "metrics": ["NDCG"],
            "topk": [10],
            "valid_metric": "NDCG@10",
            "train_neg_sample_args": None,
            "MAX_ITEM_LIST_LENGTH": hyper.length,
            "hidden_size": hyper.dim,
            "inner_size": hyper.dim,
            "n_layers": hyper.blocks,
            "n_heads": hyper.heads,
            "hidden_dropout_prob": hyper.dropout,
            "attn_dropout_prob": 0.0,
            "learning_rate": hyper.learning_rate,
            "train_batch_size": hyper.batch,
            "epochs": hyper.epochs,
            "stopping_step": hyper.patience,
            "show_progress": False,
            "use_gpu": device.type == "cuda",
            "seed": seed,
        }
        # RecBole reads the command line too, and takes its own options from there.
        arguments, sys.argv = sys.argv, sys.argv[:1]
        config = Config(model="SASRec", dataset=NAME, config_dict=settings)
        sys.argv = arguments
        init_seed(seed, reproducibility=True)
        dataset = create_dataset(config)
        training, validation, _ = data_preparation(config, dataset)
        torch.autograd.set_detect_anomaly(False)  # importing RecBole's sequential models turns it on
        model = get_model("SASRec")(config, training.dataset).to(device)
        if arm != PLAIN:
            patch_recbole(model, mechanism=arm)
        trainer = get_trainer(config["MODEL_TYPE"], "SASRec")(config, model)
        began = time.perf_counter()
        best, _ = trainer.fit(training, validation, verbose=False)
        seconds = time.perf_counter() - began
        model.load_state_dict(torch.load(trainer.saved_model_file, weights_only=False)["state_dict"])
        os.chdir(began_in)

    split = Split(histories.items, hyper.length, device)
    names = dataset.field2token_id["item_id"]
    numbers = torch.tensor([names.get(str(item), 0) for item in range(split.items + 1)], device=device)
    numbers[0] = 0
    epochs = len(trainer.train_loss_dict)
    row = TrainingRow(
        parameters=count_parameters(model),
        validation=float(best),
        best_epoch=epochs - trainer.cur_step,  # cur_step: epochs since the best validation
        epoch_seconds=seconds / epochs,  # a mean, with RecBole's validation
    )
    return Trained(row, {"ranks": evaluate(Scores(model, numbers), split.test).view(-1, TESTED).cpu()})


def search(arm: str) -> dict[str, Sequence[object]]:
    return {"learning_rate": (1e-3, 3e-3)}


EXPERIMENT = Experiment(
    name="sasrec_recbole",
    op="refined_attention",
    arms=ARMS,
    hyper=Hyperparameters(),
    search=search,
    comparisons=tuple((arm, PLAIN) for arm in ARMS if arm != PLAIN),
    load=movielens.load,
    train=train,
    metrics=ranking_metrics,
    budget=1,
    seeds=3,
)


def main() -> int:
    """In the environment of RecBole's own: its trainer needs more than that of the tests has."""
    if find_spec("tensorboard") is not None:
        return experiment.main(EXPERIMENT, None, __doc__)
    from benchmarks.clients.run import environment, pins
    from tests.packaging.versions import pip_install

    python = environment("recbole")
    pip_install(python, *pins("rich"))
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.call([python, "-m", "benchmarks.quality.sasrec_recbole", *sys.argv[1:]], env=variables)


if __name__ == "__main__":
    sys.exit(main())

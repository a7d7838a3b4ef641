"""RecBole's SASRec and BERT4Rec by its Trainer, and with refined attention: the last movie of each user is the test."""

import os
import time

import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

from benchmarks.clients.comparison import Outcome, compare
from recattn.integrations.recbole import patch_recbole

# RecBole's checkpoints hold more than tensors, which torch.load refuses by default since torch 2.6.
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"

EPOCHS, MECHANISM, METRIC = 2, "value", "ndcg@10"
SETTINGS = {
    "epochs": EPOCHS,
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
    "metrics": ["NDCG"],
    "valid_metric": METRIC,
    "train_neg_sample_args": None,  # cross-entropy over all movies
    "MAX_ITEM_LIST_LENGTH": 20,
    "hidden_size": 32,
    "inner_size": 64,
    "hidden_dropout_prob": 0.2,
    "attn_dropout_prob": 0.2,
    "train_batch_size": 1024,
    "show_progress": False,
    "use_gpu": False,
}


def main() -> None:
    for name in ("SASRec", "BERT4Rec"):
        config = Config(model=name, dataset="ml-100k", config_dict=SETTINGS)
        compare(
            lambda refined, config=config: train(config, refined),
            library="RecBole",
            package="recbole",
            model=name,
            attention=f"refined, {MECHANISM}",
            epochs=EPOCHS,
            metric="test NDCG@10",
        )


def train(config: Config, refined: bool) -> Outcome:
    init_seed(config["seed"], config["reproducibility"])
    train_data, valid_data, test_data = data_preparation(config, create_dataset(config))
    model = get_model(config["model"])(config, train_data.dataset)
    torch.autograd.set_detect_anomaly(False)  # importing RecBole's sequential models turns it on
    if refined:
        patch_recbole(model, mechanism=MECHANISM)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    began = time.process_time()
    trainer.fit(train_data, valid_data, verbose=False)
    seconds = (time.process_time() - began) / EPOCHS
    return Outcome(seconds, float(trainer.evaluate(test_data)[METRIC]))


if __name__ == "__main__":
    main()

"""A model with sink attention trains in two processes, by DDP and by FSDP2, with the losses of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

transformers = pytest.importorskip("transformers", reason="needs transformers")

from recattn.integrations.transformers import enable_sink_attention  # noqa: E402

ROOT = Path(__file__).parents[2]
SINK, STEPS, BATCH = 7, 4, 4
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


def build() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(vocab_size=60, max_position_embeddings=32, **sizes, **no_dropout)
    model = transformers.BertForMaskedLM(config)
    enable_sink_attention(model, sink_token_id=SINK)
    return model.train()


def batches() -> list[dict[str, torch.Tensor]]:
    """In the last batch the second process's half has no sink."""
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for step in range(STEPS):
        input_ids = torch.randint(10, 60, (BATCH, 20), generator=generator)
        input_ids[: BATCH // 2 if step == STEPS - 1 else BATCH, 2::4] = SINK
        mask = torch.ones_like(input_ids)
        mask[1::2, 15:] = 0
        drawn.append({"input_ids": input_ids, "attention_mask": mask, "labels": input_ids})
    return drawn


def train(model: nn.Module, rank: int = 0, world: int = 1) -> list[float]:
    """Losses of the whole batch. Every process has the same number of tokens."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for batch in batches():
        share = {name: x[rank * BATCH // world : (rank + 1) * BATCH // world] for name, x in batch.items()}
        loss = model(**share).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
            mean /= world
        losses.append(mean.item())
    return losses


def wrapped(model: nn.Module, how: str) -> nn.Module:
    if how == "DDP":
        return DistributedDataParallel(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    losses = {how: train(wrapped(build(), how), rank, 2) for how in ("DDP", "FSDP2")}
    if rank == 0:
        torch.save(losses, Path(folder) / "losses.pt")
    dist.barrier()  # neither closes its connections while the other is at work
    dist.destroy_process_group()


def start_workers(folder: str) -> None:
    """In a process that has imported what they need, and has yet to compute: they are forks of it."""
    torch.multiprocessing.start_processes(worker, (folder,), nprocs=2, start_method="fork")


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> dict[str, list[float]]:
    folder = str(tmp_path_factory.mktemp("processes"))
    environment = {"GLOO_SOCKET_IFNAME": "lo"} | os.environ
    code = f"from {__name__} import *\nstart_workers({folder!r})"
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)
    return torch.load(Path(folder) / "losses.pt")


@pytest.mark.parametrize("how", ["DDP", "FSDP2"])
def test_two_processes_train_as_one(how, losses):
    expected = train(build())
    assert expected[0] - expected[2] > 0.1  # it learns
    assert losses[how] == pytest.approx(expected, rel=1e-5)

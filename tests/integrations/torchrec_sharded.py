"""Slow test of `make clients`: TorchRec shards the table over two processes; outputs and steps are those of one."""

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints

from recattn.integrations.torchrec import JaggedLREA, JaggedSinkAttention
from recattn.nn import LREA, SinkAttention

WORLD, ITEMS, DIM, USERS, LONGEST = 2, 40, 8, 6, 90
LEARNING_RATE = 0.01  # of the optimizer that sharded tables have fused into their backward
NAMES = ["history", "item"]


class Ranker(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        table = EmbeddingConfig(name="movies", embedding_dim=DIM, num_embeddings=ITEMS, feature_names=NAMES)
        self.embeddings = EmbeddingCollection(tables=[table], device=torch.device(device))
        torch.manual_seed(1)
        self.attention = JaggedSinkAttention(SinkAttention(DIM, 2))
        self.lrea = JaggedLREA(LREA(DIM, LONGEST, 3))

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        embeddings = self.embeddings(features)
        history = self.attention(embeddings["history"], is_causal=True)
        return self.lrea(embeddings["item"].values(), history)


def share(rank: int) -> KeyedJaggedTensor:
    """The users of a process: other lengths in each."""
    generator = torch.Generator().manual_seed(rank)
    lengths = torch.randint(LONGEST + 1, (USERS,), generator=generator)
    values = torch.randint(ITEMS, (int(lengths.sum()) + USERS,), generator=generator)
    return KeyedJaggedTensor(NAMES, values, lengths=torch.cat([lengths, torch.ones(USERS, dtype=torch.int64)]))


def one_process(weight: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The outputs of each share, and the table after a step down the mean of their losses."""
    model = Ranker("cpu")
    table = model.embeddings.embeddings["movies"].weight
    table.data.copy_(weight)
    outputs = [model(share(rank)) for rank in range(WORLD)]
    sum(out.square().sum() for out in outputs).backward()
    return [out.detach() for out in outputs], weight - LEARNING_RATE * table.grad / WORLD


def one_of_two(rank: int, store: str, weight: torch.Tensor, outputs: list, stepped: torch.Tensor) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    model, sharder = Ranker("meta"), EmbeddingCollectionSharder()
    constraints = {"movies": ParameterConstraints(sharding_types=["row_wise"])}
    planner = EmbeddingShardingPlanner(topology=Topology(WORLD, "cpu"), constraints=constraints)
    plan = planner.collective_plan(model, [sharder], dist.group.WORLD)
    model = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=[sharder])
    (shard,) = model.state_dict()["embeddings.embeddings.movies.weight"].local_shards()
    first, rows = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]
    assert rows == ITEMS // WORLD
    with torch.no_grad():
        shard.tensor.copy_(weight[first : first + rows])
    out = model(share(rank))
    torch.testing.assert_close(out.detach(), outputs[rank], atol=1e-6, rtol=1e-5)
    out.square().sum().backward()
    torch.testing.assert_close(shard.tensor, stepped[first : first + rows], atol=1e-7, rtol=0)
    assert (shard.tensor - weight[first : first + rows]).abs().max() > 1e-5
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_step_as_one(tmp_path, monkeypatch):
    for name, value in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", str(WORLD))):
        monkeypatch.setenv(name, value)
    weight = torch.randn(ITEMS, DIM, generator=torch.Generator().manual_seed(7))
    arguments = (str(tmp_path / "store"), weight, *one_process(weight))
    torch.multiprocessing.spawn(one_of_two, arguments, nprocs=WORLD)

"""States as rows of a table over two processes: TorchRec's EmbeddingCollection, and a DTensor.

    python -m benchmarks.serving.sharded_tables    # milliseconds of a 256-user read, 8 KiB a row

tests/serving/test_sharded_tables.py holds both to the direct computation, bit for bit.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh, zeros

import recattn
from recattn.nn.lrea import LREAState
from recattn.serving import MemoryStore, SlotMap, StateSchema, StateStore

PART = 4096  # users that are copied at once
ASKED, WARM_UP = 256, 20  # users of a read that is timed, and reads before


# --- Users and rows ---


def number_users(user_ids: Tensor, capacity: int) -> SlotMap:
    """Give users rows. Every process does this with the same ids in the same order, and gets the same rows."""
    slot_map = SlotMap(capacity)
    slot_map.publish(slot_map.reserve(user_ids.numpy()))
    return slot_map


def rows_of(slot_map: SlotMap, user_ids: Tensor) -> Tensor:
    """Each user's row in a table of capacity + 1 rows. The last is zeros, for users without a state."""
    slots = slot_map.acquire(user_ids.numpy())
    slot_map.release(slots)
    rows = torch.from_numpy(slots)
    return rows.where(rows >= 0, slot_map.capacity)


def fill_shard(shard: Tensor, first: int, slot_map: SlotMap, schema: StateSchema, store: StateStore) -> None:
    """Write rows first, first + 1, … of the table, which are this process's shard [rows, W], from a store."""
    shard.zero_()
    user_ids = torch.from_numpy(slot_map.ids())
    rows = rows_of(slot_map, user_ids) - first
    here = (rows >= 0) & (rows < len(shard))
    for part, users in zip(rows[here].split(PART), user_ids[here].split(PART), strict=True):
        shard[part] = schema.to_rows(store.get_many(users).state).view(shard.dtype)


def attend(schema: StateSchema, state: LREAState, targets: Tensor, lengths: Tensor) -> Tensor:
    """Scores of ragged candidates: targets [T, H, d], of which user u has lengths[u]."""
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    scales = {"key_scales": state.key_scales, "value_scales": state.value_scales}
    slots = torch.arange(len(lengths))
    return recattn.lrea_absorbed_attention(targets, state.keys, state.values, slots, offsets, **scales)


# --- TorchRec ---


class TorchRecTables:
    """A table of states and one of item embeddings [I, H, d], both row_wise over the processes of the default group.

    The rows are float32 and not pooled: a pooled lookup adds to zeros, which changes bits.
    """

    def __init__(self, schema: StateSchema, slot_map: SlotMap, store: StateStore, items: Tensor) -> None:
        self.schema, self.slot_map = schema, slot_map
        name = f"states_{schema.model}"  # a checkpoint of another model has no table of this name
        self.states, shard, first = row_wise_table(name, "user", slot_map.capacity + 1, schema.row_width)
        fill_shard(shard, first, slot_map, schema, store)
        self.items, shard, first = row_wise_table("item_embeddings", "candidate", len(items), items[0].numel())
        shard.copy_(items.flatten(1)[first : first + len(shard)])

    @torch.no_grad()
    def read(self, user_ids: Tensor) -> LREAState:
        """The states of this process's users, as many as in the others."""
        rows = look_up(self.states, "user", rows_of(self.slot_map, user_ids), torch.ones_like(user_ids))
        return self.schema.from_rows(rows)

    @torch.no_grad()
    def score(self, user_ids: Tensor, candidates: Tensor, lengths: Tensor) -> Tensor:
        """[T, H, dv]. User u has lengths[u] of the candidates [T], rows of the items."""
        targets = look_up(self.items, "candidate", candidates, lengths)
        targets = targets.unflatten(1, (self.schema.heads, self.schema.dim))
        return attend(self.schema, self.read(user_ids), targets, lengths)


def look_up(collection: torch.nn.Module, feature: str, rows: Tensor, lengths: Tensor) -> Tensor:
    from torchrec import KeyedJaggedTensor

    return collection(KeyedJaggedTensor([feature], rows, lengths=lengths))[feature].values()


def row_wise_table(name: str, feature: str, rows: int, width: int) -> tuple[torch.nn.Module, Tensor, int]:
    """A sharded EmbeddingCollection of one table, this process's shard of it, and which row is the shard's first."""
    from torchrec import EmbeddingCollection, EmbeddingConfig
    from torchrec.distributed.shard import shard
    from torchrec.distributed.sharding_plan import row_wise

    table = EmbeddingConfig(name=name, num_embeddings=rows, embedding_dim=width, feature_names=[feature])
    collection = shard(
        EmbeddingCollection(tables=[table], device=torch.device("meta")), row_wise(compute_kernel="fused")
    )
    (mine,) = collection.state_dict()[f"embeddings.{name}.weight"].local_shards()
    return collection, mine.tensor.detach(), mine.metadata.shard_offsets[0]


# --- DTensor ---


class DTensorTable:
    """A table of states with Shard(0) over the processes of the default group.

    It is int32: `embedding` adds the rows of one process to the zeros of the others, which changes the bits of float32
    (-0.0 becomes 0.0, a NaN another NaN) and none of an integer.
    """

    def __init__(self, schema: StateSchema, slot_map: SlotMap, store: StateStore) -> None:
        self.schema, self.slot_map = schema, slot_map
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        rows, width = slot_map.capacity + 1, schema.row_width
        self.table = zeros(rows, width, dtype=torch.int32, device_mesh=mesh, placements=[Shard(0)])
        first = mesh.get_local_rank() * -(-rows // mesh.size())
        fill_shard(self.table.to_local(), first, slot_map, schema, store)

    def read(self, user_ids: Tensor) -> LREAState:
        """The states of this process's users, as many as in the others."""
        mine = DTensor.from_local(rows_of(self.slot_map, user_ids), self.table.device_mesh, [Shard(0)])
        rows = mine.redistribute(placements=[Replicate()])  # else DTensor would gather the table
        read = torch.nn.functional.embedding(rows, self.table).redistribute(placements=[Shard(0)])
        return self.schema.from_rows(read.to_local())

    def score(self, user_ids: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
        return attend(self.schema, self.read(user_ids), targets, lengths)


# --- Measured ---


def measure(name: str, read: Callable[[Tensor], object], users: int, reads: int) -> str:
    """Times of reads, each of other users."""
    times = []
    for number in range(WARM_UP + reads):
        asked = torch.randint(users, (ASKED,), generator=torch.Generator().manual_seed(number))
        start = time.perf_counter()
        read(asked)
        times.append(1e3 * (time.perf_counter() - start))
    p50, p99 = torch.tensor(times[WARM_UP:]).quantile(torch.tensor([0.5, 0.99])).tolist()
    return f"{name:12} p50 {p50:.2f} ms   p99 {p99:.2f} ms"


def worker(rank: int, folder: str, users: int, reads: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    schema = StateSchema(heads=1, rank=16, dim=64, value_dim=64, dtype=torch.float32, model="measured")
    slot_map, nobody = number_users(torch.arange(users), users), MemoryStore(schema)
    tables = TorchRecTables(schema, slot_map, nobody, torch.ones(100, 1, 64))
    lines = [measure("TorchRec", tables.read, users, reads)]
    table = DTensorTable(schema, slot_map, nobody)
    lines += [measure("DTensor", table.read, users, reads)]
    dist.barrier()
    if rank == 0:
        table = torch.ones(users, schema.row_width)
        print("\n".join([*lines, measure("index_select", lambda asked: table[asked], users, reads)]))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--reads", type=int, default=500)
    arguments = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torchrec.distributed.shard  # noqa: F401 once, as the workers are forks

    with tempfile.TemporaryDirectory() as folder:
        start = (folder, arguments.users, arguments.reads)
        torch.multiprocessing.start_processes(worker, start, nprocs=2, start_method="fork")


if __name__ == "__main__":
    main()

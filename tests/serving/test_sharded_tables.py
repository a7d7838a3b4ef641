"""States in tables over two processes give the scores of the direct computation, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from recattn.nn.lrea import LREAState
from recattn.serving import StateSchema

pytest.importorskip("lmdb", reason="needs lmdb")
if not dist.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)

from benchmarks.serving.sharded_tables import DTensorTable, TorchRecTables, attend, number_users
from recattn.serving import LMDBStore

ROOT = Path(__file__).parents[2]
H, R, D, DV, ITEMS, USERS, ASKED = 2, 5, 8, 6, 30, 23, 9
NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
USER_IDS = torch.arange(USERS) * 2**40 - 2**42
MISSING = 7
# In rows of int8 states: -0.0, a signalling NaN and a subnormal number, where float32 is not copied but computed with.
LANES = torch.tensor([-(2**31), 0x7F800001, 1], dtype=torch.int32).view(torch.int8)


def open_store(folder: str, name: str, **options: object) -> LMDBStore:
    return LMDBStore(Path(folder) / name, StateSchema(H, R, D, DV, NAMES[name], "m"), **options)


def write_states(folder: str, name: str) -> None:
    dtype, generator = NAMES[name], torch.Generator().manual_seed(3)
    keys, values = (torch.randn(USERS, H, R, width, generator=generator) for width in (D, DV))
    keys[:, 0, 0, :2] = -0.0
    state = LREAState(keys.to(dtype), values.to(dtype), None, None)
    if dtype == torch.int8:
        keys, values = ((100 * x).clamp(-128, 127).to(dtype) for x in (keys, values))
        keys.view(USERS, -1)[:, : len(LANES)] = LANES
        state = LREAState(keys, values, *torch.rand(2, USERS, H, R, generator=generator))
    with open_store(folder, name, max_bytes=1 << 24) as store:
        assert store.put_many(USER_IDS, state).all()


def items() -> torch.Tensor:
    return torch.randn(ITEMS, H, D, generator=torch.Generator().manual_seed(4))


def request(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Users of both shards, one who appears twice and one who is missing; and ragged candidates."""
    generator = torch.Generator().manual_seed(rank)
    users = USER_IDS[torch.randperm(USERS, generator=generator)[:ASKED]]
    users[2], users[5] = users[0], MISSING
    lengths = torch.randint(1, 6, (ASKED,), generator=generator)
    lengths[3] = 0
    return users, torch.randint(ITEMS, (int(lengths.sum()),), generator=generator), lengths


def worker(rank: int, folder: str, has_torchrec: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    users, candidates, lengths = request(rank)
    slot_map = number_users(USER_IDS, USERS)
    scores = {}
    for name in NAMES:
        with open_store(folder, name, readonly=True) as store:
            table = DTensorTable(store.schema, slot_map, store)
            scores["DTensor", name] = table.score(users, items()[candidates], lengths)
            if has_torchrec:
                tables = TorchRecTables(store.schema, slot_map, store, items())
                scores["TorchRec", name] = tables.score(users, candidates, lengths)
    torch.save(scores, Path(folder) / f"scores{rank}.pt")
    dist.barrier()  # neither closes its connections while the other is at work
    dist.destroy_process_group()


def start_workers(folder: str) -> None:
    """In a process that has imported what they need, and has yet to compute: they are forks of it."""
    try:
        import torchrec.distributed.shard  # noqa: F401
    except (ImportError, OSError):  # it is not here, or of another torch
        has_torchrec = False
    else:
        has_torchrec = True
    torch.multiprocessing.start_processes(worker, (folder, has_torchrec), nprocs=2, start_method="fork")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("processes"))
    for name in NAMES:
        write_states(folder, name)
    environment = {"GLOO_SOCKET_IFNAME": "lo"} | os.environ
    code = f"from {__name__} import *\nstart_workers({folder!r})"
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)
    return folder


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["TorchRec", "DTensor"])
def test_scores_are_those_of_the_direct_computation(how, name, folder):
    for rank in range(2):
        scores = torch.load(Path(folder) / f"scores{rank}.pt")
        if (how, name) not in scores:
            pytest.skip("TorchRec is not installed: pip install --no-deps -r requirements/torchrec.txt")
        users, candidates, lengths = request(rank)
        with open_store(folder, name, readonly=True) as store:
            stored = store.get_many(users)
            assert stored.found.tolist() == [user != MISSING for user in users.tolist()]
            expected = attend(store.schema, stored.state, items()[candidates], lengths)
        assert torch.equal(scores[how, name].view(torch.int32), expected.view(torch.int32))
        assert expected.abs().sum() > 1

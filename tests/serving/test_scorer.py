"""A scorer without Python gives Python's scores, bit for bit, and refuses the records that Python refuses."""

import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from recattn._extension import MISSING
from recattn.nn import LREA
from recattn.serving import StateSchema

pytest.importorskip("lmdb")
pytest.importorskip("xxhash")
if "cpu" in MISSING:
    pytest.skip(MISSING["cpu"], allow_module_level=True)

from xxhash import xxh3_64_digest

from benchmarks.serving.scorer import build_command
from recattn.serving import StateStore, export_scorer
from recattn.serving.stores.records import CHECKSUM, EXPIRES
from tests.helpers.stores import Engine

EMBED_DIM, ITEMS = 16, 50
ABSENT, EXPIRED, OTHER_SCHEMA, OTHER_USER, DAMAGED, CUT, LONGER = range(90, 97)
STATUSES = {
    ABSENT: "missing",
    EXPIRED: "expired",
    OTHER_SCHEMA: "refused:schema",
    OTHER_USER: "refused:user",
    DAMAGED: "refused:checksum",
    CUT: "refused:schema",
    LONGER: "refused:schema",
}
BATCHES = [
    {0: [3, 4, 0, 49, 7], ABSENT: [3, 4], 1: [], EXPIRED: [5], OTHER_SCHEMA: [1], 2: [9, -1, ITEMS, 9]},
    {5: [11], CUT: [4, 2], LONGER: [3]},
    {OTHER_USER: [2, 8], DAMAGED: [8, 3], 3: [2, 8, 3]},
]


class TwoScores(nn.Module):
    def forward(self, h, targets):
        return h[:, 5:7] * targets[:, :2]


def dot(h, targets):
    return (h.double() * targets.double()).sum(-1).float()


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Compiles the C++ program while Python compiles the packages: call it to wait for the program's path."""
    command = build_command(tmp_path_factory.mktemp("program") / "scorer")
    if shutil.which(command[0]) is None:
        pytest.skip(f"no C++ compiler: {command[0]} is not on the PATH")
    headers = "".join(f"#include <{name}>\n" for name in ("lmdb.h", "hiredis/hiredis.h", "xxhash.h"))
    found = subprocess.run([command[0], "-E", "-xc", "-"], input=headers, capture_output=True, text=True)
    if found.returncode:
        packages = "liblmdb-dev, libhiredis-dev, libxxhash-dev"
        pytest.skip(f"no headers of LMDB, hiredis and xxHash ({packages}): {found.stderr.splitlines()[0]}")
    compiler = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def program() -> str:
        _, errors = compiler.communicate(timeout=300)
        assert compiler.returncode == 0, errors
        return command[command.index("-o") + 1]

    yield program
    compiler.kill()
    compiler.wait()


def fill(engine: Engine, schema: StateSchema, lrea: LREA) -> None:
    """States of users 0 to 5, and every way not to have one."""

    def put(schema: StateSchema, *users: int) -> None:
        state = lrea.export_state(torch.randn(len(users), lrea.max_len, EMBED_DIM))
        engine.open(schema).put_many(torch.tensor(users), state)

    put(dataclasses.replace(schema, model="another"), OTHER_SCHEMA)
    put(schema, *range(6), EXPIRED, OTHER_USER, DAMAGED, CUT, LONGER)
    engine.write_record(OTHER_USER, engine.record(0))
    engine.write_record(CUT, engine.record(CUT)[:50])  # less than a header
    engine.write_record(LONGER, engine.record(LONGER) + bytes(64))
    record = engine.record(DAMAGED)
    engine.write_record(DAMAGED, record[:-1] + bytes([record[-1] ^ 1]))
    expired = bytearray(engine.record(EXPIRED))
    expired[EXPIRES] = (1).to_bytes(4, "little")  # a second after 1970 began
    expired[CHECKSUM] = xxh3_64_digest(expired[CHECKSUM.stop :])[::-1]
    engine.write_record(EXPIRED, bytes(expired))


def run(program: str, folder: Path, store: str, **environment: str) -> list[list[tuple[int, str, torch.Tensor]]]:
    """User, status and scores of each line that the program answers, batch by batch."""
    lines = [[f"{user} {' '.join(map(str, ids))}\n" for user, ids in batch.items()] for batch in BATCHES]
    requests = "".join("".join(batch) + "\n" for batch in lines)
    command, env = [program, str(folder), store], {**os.environ, **environment}
    ran = subprocess.run(command, input=requests, env=env, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    words = [line.split() for line in ran.stdout.splitlines()]
    answers = [(int(user), status, torch.tensor([*map(float.fromhex, scores)])) for user, status, *scores in words]
    return [[answers.pop(0) for _ in batch] for batch in BATCHES]


def expected(store: StateStore, lrea: LREA, items: torch.Tensor, score) -> list[list[tuple[int, str, torch.Tensor]]]:
    """The same in Python, over `get_many`."""
    answers = []
    for batch in BATCHES:
        state = store.get_many(torch.tensor([*batch]), on_invalid="missing").state
        counts = torch.tensor([len(ids) for ids in batch.values()])
        ids = torch.tensor([item for ids in batch.values() for item in ids])
        known = (ids >= 0) & (ids < ITEMS)
        targets = items[ids.where(known, 0)]
        scores = score(lrea.attend(targets, state, target_offsets=nn.functional.pad(counts.cumsum(0), (1, 0))), targets)
        scores[~known] = -torch.inf
        of_users = scores.split(counts.tolist())
        answers.append([(user, STATUSES.get(user, "ok"), of_users[i].flatten()) for i, user in enumerate(batch)])
    return answers


def test_cpp_scores_are_pythons_bit_for_bit(build, tmp_path, redis_server):
    cases = (
        (torch.int8, torch.float32, {"orientation": "weights", "num_heads": 2}, TwoScores()),
        (torch.bfloat16, torch.bfloat16, {"negative_slope": 0.2, "num_heads": 2}, None),
    )
    for dtype, item_dtype, options, score in cases:
        lrea = LREA(EMBED_DIM, 20, 8, **options)
        items = torch.randn(ITEMS, EMBED_DIM).to(item_dtype)
        schema = StateSchema.of(lrea, dtype, items=items)
        slope = lrea.absorbed_negative_slope
        folder = export_scorer(tmp_path / f"scorer_{dtype}", schema, items, negative_slope=slope, score=score)
        environment = {}
        if score is None:  # a server that loads no libraries has them preloaded
            libraries = shutil.move(folder / "ops", tmp_path / "preloaded")
            (folder / "ops").mkdir()
            environment["LD_PRELOAD"] = str(Path(libraries) / "_C.abi3.so")
        for engine in (Engine("lmdb", tmp_path / f"states {dtype}"), Engine("redis", redis_server.url)):
            fill(engine, schema, lrea)
            address = str(engine.place)
            if engine.name == "redis":
                address = f"redis:127.0.0.1:{redis_server.port}:{engine.namespace}"
            got = run(build(), folder, address, **environment)
            right = expected(engine.store, lrea, items, score or dot)
            engine.close()
            for answered, computed in zip(got, right, strict=True):
                for (user, status, scores), (its_user, its_status, its_scores) in zip(answered, computed, strict=True):
                    assert (user, status) == (its_user, its_status)
                    assert torch.equal(scores, its_scores), (dtype, engine.name, user)
            assert len(set(got[0][0][2].tolist())) > 3
    # What a server reads: the size of a record, and scores per candidate.
    config = (tmp_path / "scorer_torch.int8" / "config.pbtxt").read_text()
    nbytes = (tmp_path / "scorer_torch.int8" / "1" / "empty_record.bin").stat().st_size
    assert re.search(rf'INPUT__0" data_type: TYPE_UINT8 dims: \[ -1, {nbytes} \]', config)
    assert re.search(r'OUTPUT__0" data_type: TYPE_FP32 dims: \[ -1, 2 \]', config)


class WrongScore(nn.Module):
    def forward(self, h, targets):
        return h.sum()


SCHEMA = StateSchema(heads=1, rank=4, dim=8, value_dim=8, dtype=torch.bfloat16, model="m")
WIDE = StateSchema(heads=2, rank=4, dim=8, value_dim=8, dtype=torch.bfloat16, model="m")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"folder": "."}, "folder must be new or empty"),
        ({"schema": "m"}, "schema must be a StateSchema, got str"),
        ({"items": torch.zeros(5, 1, 8)}, r"items must be \[I, d\] = \[I, 8\], got \[5, 1, 8\]"),
        ({"items": torch.zeros(0, 8)}, "I of items must be at least 1, got 0"),
        ({"items": torch.zeros(5, 8).half()}, "items must be float32 or bfloat16, got float16"),
        ({"negative_slope": float("nan")}, "negative_slope must be finite"),
        ({"score": dot}, "score must be a torch.nn.Module or None, got function"),
        ({"schema": WIDE}, r"score must be a module that maps h \[T, 16\] and targets \[T, 8\] to scores"),
        ({"score": WrongScore()}, r"score\(h, targets\) must be \[T, n\].*, got \[\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_name_the_argument(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    given = {"folder": "new", "schema": SCHEMA, "items": torch.zeros(5, 8), "negative_slope": 0.1} | arguments
    with pytest.raises(ValueError, match=message):
        export_scorer(**given)
    assert not Path("new").exists()

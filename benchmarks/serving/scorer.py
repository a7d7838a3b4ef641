"""`python -m benchmarks.serving.scorer`: requests of 256 users from LMDB, scored by scorer.cpp and by Python.

It takes a C++20 compiler and the headers of LMDB, hiredis and xxHash: on Debian, liblmdb-dev, libhiredis-dev and
libxxhash-dev. With `--build PROGRAM` it only compiles scorer.cpp against this environment's PyTorch.
"""

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from recattn.nn import LREA
from recattn.serving import LMDBStore, StateSchema, export_scorer

SOURCE = Path(__file__).with_suffix(".cpp")
ITEMS, USERS_OF_A_REQUEST, MOST_CANDIDATES = 100_000, 256, 200
PUT_AT_ONCE = 4096
WARM_UP = 20
Request = tuple[Tensor, Tensor, Tensor]  # user ids, item ids and offsets


def build_command(program: Path) -> list[str]:
    """Compiles scorer.cpp to `program`."""
    includes = [f"-isystem{path}" for path in include_paths()]
    libraries = [option for path in library_paths() for option in (f"-L{path}", f"-Wl,-rpath,{path}")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    # The package needs libtorch, which is looked for where the program has it.
    linked = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-llmdb", "-lhiredis", "-ldl"]
    options = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", abi]
    return [os.environ.get("CXX", "g++"), *options, *includes, str(SOURCE), "-o", str(program), *libraries, *linked]


def draw_requests(count: int, users: int) -> Iterator[Request]:
    """Users at random, with 1 to 200 candidates each."""
    for _ in range(count):
        counts = torch.randint(1, MOST_CANDIDATES + 1, (USERS_OF_A_REQUEST,))
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        yield torch.randint(users, (USERS_OF_A_REQUEST,)), torch.randint(ITEMS, (int(offsets[-1]),)), offsets


def score_in_python(store: LMDBStore, lrea: LREA, items: Tensor, request: Request) -> Tensor:
    users, item_ids, offsets = request
    targets = items[item_ids]
    h = lrea.attend(targets, store.get_many(users).state, target_offsets=offsets)
    return (h.double() * targets.double()).sum(-1).float()


def as_lines(request: Request) -> str:
    users, item_ids, offsets = (x.tolist() for x in request)
    rows = [[user, *item_ids[offsets[i] : offsets[i + 1]]] for i, user in enumerate(users)]
    return "".join(" ".join(map(str, row)) + "\n" for row in rows) + "\n"


def scores_of(lines: list[str]) -> Tensor:
    return torch.tensor([float.fromhex(score) for line in lines for score in line.split()[2:]])


def measure(folder: Path, dtype: torch.dtype, users: int, count: int) -> None:
    lrea = LREA(64, 50, 32)
    items = torch.randn(ITEMS, 64).to(torch.float32 if dtype == torch.int8 else dtype)
    schema = StateSchema.of(lrea, dtype, model="benchmark")
    with LMDBStore(folder / "states", schema) as store:
        for first in range(0, users, PUT_AT_ONCE):
            ids = torch.arange(first, min(first + PUT_AT_ONCE, users))
            store.put_many(ids, lrea.export_state(torch.randn(len(ids), lrea.max_len, 64)))
    scorer = export_scorer(folder / "scorer", schema, items, negative_slope=lrea.absorbed_negative_slope)
    program, times = folder.parent / "scorer", folder / "times"
    requests = list(draw_requests(WARM_UP + count, users))
    command, lines = [str(program), str(scorer), str(folder / "states"), str(times)], map(as_lines, requests)
    answers = subprocess.run(command, input="".join(lines), stdout=subprocess.PIPE, text=True, check=True).stdout
    ms = {"C++": np.loadtxt(times), "Python": []}
    with LMDBStore(folder / "states", schema, readonly=True) as store:
        for request in requests:
            start = time.perf_counter()
            scores = score_in_python(store, lrea, items, request)
            ms["Python"].append(1e3 * (time.perf_counter() - start))
    last = scores_of(answers.splitlines()[-USERS_OF_A_REQUEST:])
    print(f"{schema}; {users:,} users; {torch.get_num_threads()} threads; equal bits: {torch.equal(last, scores)}")
    for name, of_requests in ms.items():
        p50, p99 = np.percentile(of_requests[WARM_UP:], (50, 99))
        print(f"  {name:6}  p50 {p50:6.2f} ms  p99 {p99:6.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, metavar="PROGRAM")
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=300)
    arguments = parser.parse_args()
    if arguments.build:
        subprocess.run(build_command(arguments.build), check=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run(build_command(Path(temporary, "scorer")), check=True)
        for dtype in (torch.int8, torch.bfloat16):
            folder = Path(temporary, str(dtype))
            folder.mkdir()
            measure(folder, dtype, arguments.users, arguments.requests)


if __name__ == "__main__":
    main()

"""fork and spawn, after import and after use: what PyTorch itself survives, recattn survives."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CALL = """
import os, sys, torch, recattn
sys.path.insert(0, {root!r})
torch.set_num_threads({threads})
from recattn.serving import StateTable
def attend():
    q = torch.randn(2, 4, 300, 32, requires_grad=True)
    positions = torch.tensor([[0, 7, 9], [1, 2, -1]])
    out = recattn.sink_attention(q, q, q, positions, torch.zeros(2, 1, 3, 3), causal=True)
    out.sum().backward()
    table = StateTable(4, heads=1, rank=2, dim=3)
    table.put(torch.tensor([5]), torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 3))
    served = table.attend(torch.ones(2, 1, 3), torch.tensor([5]), torch.tensor([0, 2]))
    assert out.isfinite().all() and q.grad.isfinite().all() and served.isfinite().all()
"""
FORK = """
{use}
child = os.fork()
if child == 0:
    attend()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
attend()
"""
SPAWN = """
import multiprocessing
def work(_):
    attend()
    return 7
if __name__ == "__main__":
    {use}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*pool.map(work, [0]))
    attend()
"""


def run(code: str, folder: Path) -> str:
    program = folder / "program.py"
    program.write_text(code)
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.skipif(not hasattr(sys, "getdlopenflags"), reason="no fork here")
@pytest.mark.parametrize("use, threads", [("pass", 2), ("attend()", 1)], ids=["after import", "after use"])
def test_fork(use, threads, tmp_path):
    """After use with one thread: with several, a child hangs in OpenMP, as PyTorch's own operators do."""
    code = CALL.format(root=str(ROOT), threads=threads) + FORK.format(use=use)
    assert run(code, tmp_path) == "7\n"


def test_spawn_after_use(tmp_path):
    code = CALL.format(root=str(ROOT), threads=2) + SPAWN.format(use="attend()")
    assert run(code, tmp_path) == "7\n"

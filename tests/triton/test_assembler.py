"""Which ptxas assembles the kernels, and that Triton has its own again afterwards."""

import os
import threading
from unittest import mock

import pytest

pytest.importorskip("triton")

from triton import knobs

from recattn.triton_kernels.common import assembler


def path_of(*versions: str) -> str:
    tools = [knobs.NvidiaTool(f"ptxas of {version}", version) for version in versions]
    with mock.patch.object(assembler, "_tools", lambda: tools):
        return assembler.path.__wrapped__()


def test_the_newest_is_taken():
    assert path_of("12.8", "12.9") == "ptxas of 12.9"
    assert path_of("13.4", "13.1") == "ptxas of 13.4"
    assert path_of("12.9", "12.10") == "ptxas of 12.10"


def test_one_that_computes_wrongly_is_refused():
    with pytest.raises(RuntimeError, match=r"ptxas 12\.8 .* set TRITON_PTXAS_PATH"):
        path_of("12.8")


def test_triton_assembles_with_it_for_hopper_alone():
    ours, own, environment = assembler.path(), knobs.nvidia.ptxas.path, dict(os.environ)
    with assembler.for_architecture(80):
        assert knobs.nvidia.ptxas.path == own
    with assembler.for_architecture(90):
        assert knobs.nvidia.ptxas.path == ours
        with assembler.for_architecture(90):
            pass
        assert knobs.nvidia.ptxas.path == ours
    assert knobs.nvidia.ptxas.path == own and os.environ == environment


def test_it_stays_while_another_thread_compiles():
    inside, leave = threading.Event(), threading.Event()

    def compiles():
        with assembler.for_architecture(90):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=compiles)
    thread.start()
    inside.wait(10)
    with assembler.for_architecture(90):
        pass
    assert knobs.nvidia.ptxas.path == assembler.path()
    leave.set()
    thread.join()
    assert vars(knobs.nvidia).get("ptxas") is None

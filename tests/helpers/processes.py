"""Work in processes that are forked from one that has imported everything and started no thread, to be killed at will.

A fork of the tests' own process would hang in OpenMP, and a new process would import PyTorch for seconds.
"""

import multiprocessing
import os
import signal
import time
from multiprocessing import forkserver

import torch

FORKED = multiprocessing.get_context("forkserver")
IMPORTED = (
    "pytest",
    "tests.helpers.stores",
    "recattn.serving.stores.lmdb",
    "recattn.serving.stores.redis",
    "pyarrow.dataset",
)
_server = None  # process id of the one that has imported it


def _start(process):
    """Start it from our server. In the same process recattn.checks starts one that imports other things."""
    global _server
    if _server is None or _server != forkserver._forkserver._forkserver_pid:
        forkserver._forkserver._stop()
        FORKED.set_forkserver_preload([__name__, *IMPORTED])  # one that is missing is passed over
    process.start()
    _server = forkserver._forkserver._forkserver_pid


def call(function, *arguments):
    """function(*arguments) in another process. It and its arguments are pickled; what it raises fails the call."""
    receiver, sender = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=_call, args=(sender, function, arguments))
    _start(process)
    sender.close()
    with receiver:
        result = receiver.recv()
    process.join()
    return result


def _call(sender, function, arguments):
    torch.set_num_threads(1)
    sender.send(function(*arguments))


class Writer:
    """A process that runs work(acknowledge, *arguments), which calls acknowledge(anything) after each thing it did.

    with Writer(work, *arguments) as writer:
        writer.kill_after(0.01)
    assert writer.acknowledged == [...]
    """

    def __init__(self, work, *arguments):
        self._receiver, sender = FORKED.Pipe(duplex=False)
        self._process = FORKED.Process(target=_work, args=(sender, work, arguments))
        _start(self._process)
        sender.close()
        self.acknowledged = []

    def wait(self):
        """Wait for the next acknowledgement."""
        self.acknowledged.append(self._receiver.recv())

    def kill_after(self, seconds, by=signal.SIGKILL):
        """Kill it by a signal so long after its next acknowledgement."""
        self.wait()
        time.sleep(seconds)
        os.kill(self._process.pid, by)
        self._process.join(20)
        assert self._process.exitcode is not None, f"it goes on after {by.name}"
        self._read_all()

    def join(self):
        """Wait until the work is done."""
        self._read_all()
        self._process.join()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.kill()
        self._process.join()
        self._receiver.close()

    def _read_all(self):
        while True:
            try:
                self.acknowledged.append(self._receiver.recv())
            except EOFError:  # also in the middle of a message
                return


def _work(sender, work, arguments):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    torch.set_num_threads(1)
    work(sender.send, *arguments)

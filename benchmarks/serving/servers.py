"""Real Redis servers on this machine, to test and measure with: they can be killed, and all are gone at exit.

with RedisServer() as server, RedisStore(server.url, schema) as store: ...
with RedisCluster(nodes=3) as cluster, RedisStore(cluster.url, schema, cluster=True) as store: ...
"""

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis

REASON = None if shutil.which("redis-server") else "redis-server is not on the PATH"
HOST = "127.0.0.1"
SLOTS = 16384
DURABLE = {"appendonly": "yes", "appendfsync": "always", "save": ""}


class RedisServer:
    """A redis-server (7 or newer) on a free port, in a temporary folder. Writes are on disk when they are answered.

    Args:
        options: of redis.conf, with underscores: `maxmemory="64mb"`, `requirepass="secret"`. With `tls_cert_file` and
            `tls_key_file` it speaks TLS only.

    Attributes:
        url: to connect to.
        process: of the running server.
    """

    def __init__(self, **options: Any) -> None:
        self.options = DURABLE | options
        self.port = free_port()
        scheme = "rediss" if "tls_cert_file" in options else "redis"
        password = f":{options['requirepass']}@" if "requirepass" in options else ""
        self.url = f"{scheme}://{password}{HOST}:{self.port}"
        self.folder = Path(tempfile.mkdtemp(prefix="recattn-redis-"))
        self._log = self.folder / "redis.log"
        self._processes: list[subprocess.Popen] = []
        self._stop_all = weakref.finalize(self, _stop_all, self._processes, self.folder)
        try:
            self.start()
        except BaseException:
            self.stop()
            raise

    @property
    def process(self) -> subprocess.Popen:
        return self._processes[-1]

    def client(self) -> redis.Redis:
        """A client of this node. It checks no certificate."""
        return redis.Redis.from_url(self.url, **({"ssl_cert_reqs": "none"} if self.url.startswith("rediss") else {}))

    def start(self) -> None:
        """Start it, again on the same port and folder, and wait until it has loaded its data and answers."""
        port = {"port": 0, "tls_port": self.port} if self.url.startswith("rediss") else {"port": self.port}
        arguments = {"bind": HOST, "dir": self.folder, **port, **self.options}
        command = ["redis-server"]
        for name, value in arguments.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        with self._log.open("ab") as log:
            self._processes[:] = [subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)]
        with self.client() as client:
            wait_until(lambda: self._answers(client), f"redis-server on port {self.port} to answer")

    def kill(self) -> None:
        """End it by SIGKILL, at whatever it is doing."""
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """Let it answer nothing, with its connections open, until `resume`."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it for good and delete its folder."""
        self._stop_all()

    def __enter__(self) -> "RedisServer":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _answers(self, client: redis.Redis) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"redis-server ended: {self._log.read_text()[-2000:]}")
        with contextlib.suppress(redis.ConnectionError):  # also while it loads
            return client.ping()
        return False


class RedisCluster:
    """A Redis Cluster of masters without replicas, in which the slots of live nodes are served when others are lost.

    Args:
        nodes: at least 3.
        options: of each node's redis.conf, as in RedisServer.

    Attributes:
        nodes: a RedisServer each.
        url: of the first node.
    """

    def __init__(self, nodes: int = 3, **options: Any) -> None:
        with contextlib.ExitStack() as stack:
            self.nodes = [stack.enter_context(self._node(options)) for _ in range(nodes)]
            self.url = self.nodes[0].url
            self._form()
            self._stack = stack.pop_all()

    def kill(self, node: int) -> None:
        self.nodes[node].kill()

    def start(self, node: int) -> None:
        """Start a node that was killed, and wait until all agree that the cluster is whole."""
        self.nodes[node].start()
        self.wait_until_whole()

    def wait_until_whole(self) -> None:
        wait_until(lambda: all(map(self._sees_all, self.nodes)), "the nodes of the cluster to find each other")

    def stop(self) -> None:
        self._stack.close()

    def __enter__(self) -> "RedisCluster":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _node(self, options: dict[str, Any]) -> RedisServer:
        defaults = {
            "cluster_enabled": "yes",
            "cluster_port": free_port(),
            "cluster_node_timeout": 500,
            "cluster_require_full_coverage": "no",
        }
        return RedisServer(**(defaults | options))

    def _form(self) -> None:
        bounds = [SLOTS * node // len(self.nodes) for node in range(len(self.nodes) + 1)]
        for number, node in enumerate(self.nodes):
            first = self.nodes[0]
            with node.client() as client:
                client.execute_command("CLUSTER ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
                client.execute_command("CLUSTER MEET", HOST, first.port, first.options["cluster_port"])
        self.wait_until_whole()

    def _sees_all(self, node: RedisServer) -> bool:
        with node.client() as client:
            info = client.execute_command("CLUSTER INFO")
        return info["cluster_state"] == "ok" and int(info["cluster_slots_ok"]) == SLOTS


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Raises TimeoutError: `what` took longer."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.01)


def _stop_all(processes: list[subprocess.Popen], folder: Path) -> None:
    for process in processes:
        process.kill()
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)

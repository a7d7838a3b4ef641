"""Commands to a Redis Cluster, node by node.

redis-py's own pipeline of a cluster retries the commands of a lost node one by one, for minutes if the node does not
answer, and then gives no answers at all. Here the users of live nodes get theirs at once.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import redis
from redis import exceptions

UNAVAILABLE = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.ReadOnlyError,  # a replica, as after a failover
    exceptions.ClusterError,
    exceptions.RedisClusterException,
)
REDIRECTED = (exceptions.AskError, exceptions.TryAgainError)  # MOVED is an AskError, too
REFRESH_SECONDS = 1.0


class ClusterPipeline:
    """Pipelines to all nodes of a cluster at a time."""

    def __init__(self, client: redis.RedisCluster) -> None:
        self._client = client
        self._refreshed = 0.0

    def run(self, keys: Sequence[bytes], commands: Sequence[tuple]) -> list[Any]:
        """The answer to each command, or the error instead of it. Each command goes to the master of its key.

        A command that a node may have executed is not sent again.
        """
        answers: list[Any] = [None] * len(commands)
        tried = {position: self._node(key) for position, key in enumerate(keys)}
        unsent = self._send(tried, commands, answers)
        moved = {position for position, answer in enumerate(answers) if isinstance(answer, exceptions.MovedError)}
        lost = any(isinstance(answer, UNAVAILABLE) for answer in answers)
        if (moved or lost) and self._refresh():
            nodes = {position: self._node(keys[position]) for position in sorted(moved | unsent)}
            self._send({p: node for p, node in nodes.items() if node != tried[p]}, commands, answers)
        for position, answer in enumerate(answers):
            if isinstance(answer, REDIRECTED):  # a slot on its way to another node
                try:
                    answers[position] = self._client.execute_command(*commands[position])
                except (redis.RedisError, *UNAVAILABLE) as error:
                    answers[position] = error
        return answers

    def _node(self, key: bytes) -> str | None:
        """The name of who has the slot of a key, as far as is known here."""
        with contextlib.suppress(*UNAVAILABLE):
            node = self._client.get_node_from_key(key)
            return None if node is None else node.name

    def _send(self, nodes: dict[int, str | None], commands: Sequence[tuple], answers: list[Any]) -> set[int]:
        """Send the commands at positions to their nodes, and fill in the answers or errors.

        Returns the positions of which nothing was sent, as their node could not be reached.
        """
        by_node = defaultdict(list)
        for position, node in nodes.items():
            by_node[node].append(position)
        unsent = set()
        with contextlib.ExitStack() as stack:
            sent = []
            for node, positions in by_node.items():
                try:
                    connection = stack.enter_context(self._connection(node))
                except UNAVAILABLE as error:
                    unsent.update(positions)
                    _fill(answers, positions, error)
                    continue
                try:
                    connection.send_packed_command(connection.pack_commands([commands[p] for p in positions]))
                    sent.append((connection, positions))
                except UNAVAILABLE as error:
                    _fill(answers, positions, error)
            for connection, positions in sent:
                _receive(connection, positions, answers)
        return unsent

    @contextlib.contextmanager
    def _connection(self, name: str | None) -> Iterator[Any]:
        node = None if name is None else self._client.get_node(node_name=name)
        if node is None:
            raise exceptions.SlotNotCoveredError("no node has the slot of its key")
        pool = self._client.get_redis_connection(node).connection_pool
        connection = pool.get_connection()
        try:
            yield connection
        except BaseException:
            connection.disconnect()  # answers that were not read would be taken for those of the next command
            raise
        finally:
            pool.release(connection)

    def _refresh(self) -> bool:
        """Ask the cluster which node has which slots, at most once a second. Returns whether it was asked."""
        now = time.monotonic()
        if now - self._refreshed < REFRESH_SECONDS:
            return False
        self._refreshed = now
        with contextlib.suppress(*UNAVAILABLE):
            self._client.nodes_manager.initialize()
            return True
        return False


def _receive(connection: Any, positions: list[int], answers: list[Any]) -> None:
    for count, position in enumerate(positions):
        try:
            answers[position] = connection.read_response()
        except redis.ResponseError as error:
            answers[position] = error
        except UNAVAILABLE as error:  # the connection is closed
            _fill(answers, positions[count:], error)
            break


def _fill(answers: list[Any], positions: list[int], error: Exception) -> None:
    for position in positions:
        answers[position] = error

"""States in Redis or a Redis Cluster: many machines."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from recattn._check import expect
from recattn._imports import importing
from recattn.serving.stores.record_store import RecordStore
from recattn.serving.stores.records import CHECKSUM, HEADER, Buffer, Kind, Unpacked
from recattn.serving.stores.schema import StateSchema
from recattn.serving.stores.store import Marks, StoreError, StoreFullError, StoreUnavailableError

with importing("redis-py", module="redis", extra="redis", user="recattn.serving.RedisStore"):
    import redis
    from redis import exceptions

# A user's two keys have one hash slot, by the braces, and change together. ARGV: state, history or "", expiry or 0, and
# the version of the state to replace, or "". A state that is not there has version 0.
PUT = f"""
if ARGV[4] ~= '' then
  local held = redis.call('GETRANGE', KEYS[1], {CHECKSUM.start}, {CHECKSUM.stop - 1})
  if held == '' then held = string.rep('\\0', 8) end
  if held ~= ARGV[4] then return 0 end
end
for i = 1, 2 do
  if ARGV[i] == '' then redis.call('DEL', KEYS[i])
  elseif ARGV[3] == '0' then redis.call('SET', KEYS[i], ARGV[i])
  else redis.call('SET', KEYS[i], ARGV[i], 'EXAT', ARGV[3]) end
end
return 1
"""
BATCH_BYTES = 4 << 20  # sent before the answers are read
UNAVAILABLE = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.ReadOnlyError,  # a replica, as after a failover
    exceptions.ClusterError,
    exceptions.RedisClusterException,
)


class RedisStore(RecordStore):
    """States in Redis (6.2 or newer) or a Redis Cluster, a key per user and one for its history:

        store = RedisStore("rediss://:password@host:6379/0", schema, ssl_ca_certs="ca.pem")
        store = RedisStore("redis://host:7000", schema, cluster=True)

    Each user is written in one step. A batch is not: after an error some users are written and others not. What
    `put_many` acknowledged survives Redis as far as Redis is set up for it: see docs/serving.md. Redis expires states
    by itself.

    A store can be sent to another process: it connects there.

    Args:
        url: redis://, rediss:// or unix://, with user and password; or a function that returns a client, for Sentinel
            and the like.
        schema: of its states.
        cluster: connect to a Redis Cluster, of which the URL names one node.
        namespace: what keys begin with.
        options: of `redis.Redis.from_url` or `redis.RedisCluster.from_url`: TLS, credentials, time-outs, retries. By
            default connecting and answering may take a second each.

    Raises:
        ImportError: redis or xxhash is not installed.
        StoreUnavailableError: the cluster cannot be reached. (A single Redis is first connected to when it is used.)
    """

    def __init__(
        self,
        url: str | Callable[[], Any],
        schema: StateSchema,
        *,
        cluster: bool = False,
        namespace: str = "recattn",
        **options: Any,
    ) -> None:
        super().__init__(schema)
        expect("{" not in namespace, "namespace", "without braces", namespace)
        self._arguments = (url, schema, cluster, namespace, options)
        self._namespace = namespace.encode()
        with _as_store_errors():
            if callable(url):
                self._client = url()
            else:
                limits = {"socket_timeout": 1.0, "socket_connect_timeout": 1.0}
                self._client = (redis.RedisCluster if cluster else redis.Redis).from_url(url, **(limits | options))
        self._is_cluster = isinstance(self._client, redis.RedisCluster)
        decodes = self._client.get_encoder().decode_responses
        expect(not decodes, "decode_responses", "False: states are bytes", decodes)

    def close(self) -> None:
        self._client.close()

    def __reduce__(self):
        return _connect, self._arguments

    def _read(self, ids: np.ndarray, kinds: Sequence[Kind]) -> list[Unpacked]:
        read = []
        for kind in kinds:
            keys = self._keys(ids, kind)
            with _as_store_errors():
                if self._is_cluster:
                    records = self._pipeline([("GET", key) for key in keys])
                else:
                    records = self._client.mget(keys) if keys else []
            read.append(self._formats[kind].unpack(ids, records))
        return read

    def _read_headers(self, ids: np.ndarray) -> list[Buffer | None]:
        commands = [("GETRANGE", key, 0, HEADER.itemsize - 1) for key in self._keys(ids, Kind.STATE)]
        return [head or None for head in self._pipeline(commands)]

    def _write(self, ids: np.ndarray, records: list[np.ndarray], marks: Marks) -> np.ndarray:
        states, histories = records[0], records[1] if len(records) > 1 else None
        commands = []
        for position, keys in enumerate(self._key_pairs(ids)):
            history = b"" if histories is None else histories[position].data
            version = b"" if marks.replaces is None else marks.replaces[position].astype("<i8").tobytes()
            expires = int(marks.expires[position])
            commands.append(("EVAL", PUT, 2, *keys, states[position].data, history, expires, version))
        per_user = sum(record.shape[1] for record in records)
        return np.array(self._pipeline(commands, max(1, BATCH_BYTES // per_user)), bool)

    def _delete(self, ids: np.ndarray) -> int:
        commands = [
            ("DEL", *keys) for keys in zip(self._keys(ids, Kind.STATE), self._keys(ids, Kind.HISTORY), strict=True)
        ]
        return sum(map(bool, self._pipeline(commands)))

    def _keys(self, ids: np.ndarray, kind: Kind) -> list[bytes]:
        suffix = b":history" if kind == Kind.HISTORY else b""
        return [b"%b:{%d}%b" % (self._namespace, user, suffix) for user in ids.tolist()]

    def _key_pairs(self, ids: np.ndarray) -> Iterator[tuple[bytes, bytes]]:
        return zip(self._keys(ids, Kind.STATE), self._keys(ids, Kind.HISTORY), strict=True)

    def _pipeline(self, commands: list[tuple], batch: int = 1024) -> list[Any]:
        answers = []
        with _as_store_errors():
            for start in range(0, len(commands), batch):
                pipeline = self._client.pipeline(transaction=False)
                for command in commands[start : start + batch]:
                    pipeline.execute_command(*command)
                # Raised here, as redis-py would put the script before the message.
                for answer in pipeline.execute(raise_on_error=False):
                    if isinstance(answer, Exception):
                        raise answer
                    answers.append(answer)
        return answers


def _connect(url, schema: StateSchema, cluster: bool, namespace: str, options: dict[str, Any]) -> RedisStore:
    return RedisStore(url, schema, cluster=cluster, namespace=namespace, **options)


@contextlib.contextmanager
def _as_store_errors() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        message = str(error)
        if isinstance(error, UNAVAILABLE) or message.startswith("NOREPLICAS"):  # fewer than min-replicas-to-write
            raise StoreUnavailableError(f"Redis is not available: {message}") from error
        if isinstance(error, redis.OutOfMemoryError) or message.startswith("MISCONF"):
            raise StoreFullError(f"Redis has no room: {message}") from error
        raise StoreError(f"Redis refused a command: {message}") from error

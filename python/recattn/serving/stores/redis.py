"""States in Redis or a Redis Cluster: many machines."""

from collections.abc import Callable, Sequence
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
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    from recattn.serving.stores.redis_cluster import UNAVAILABLE, ClusterPipeline

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
BATCH_BYTES = 1 << 20  # sent before the answers are read


class RedisStore(RecordStore):
    """States in Redis (6.2 or newer) or a Redis Cluster, a key per user and one for its history:

        store = RedisStore("rediss://:password@host:6379/0", schema, ssl_ca_certs="ca.pem")
        store = RedisStore("redis://host:7000", schema, cluster=True)

    Each user is written in one step. A batch is not: after an error some users are written and others not. What
    `put_many` acknowledged survives Redis as far as Redis is set up for it: see docs/serving.md. Redis expires states
    by itself.

    In a cluster all commands go to masters, to all at a time. If one is lost, `get_many` raises StoreUnavailableError
    with the states of the users of the others.

    A store can be sent to another process: it connects there.

    Args:
        url: redis://, rediss:// or unix://, with user and password; or a function that returns a client, for Sentinel
            and the like.
        schema: of its states.
        cluster: connect to a Redis Cluster, of which the URL names one node.
        namespace: what keys begin with.
        options: of `redis.Redis.from_url` or `redis.RedisCluster.from_url`: TLS, credentials, time-outs, retries. By
            default connecting and answering may take a second each, and a command that may have run is not sent again.

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
        fits = isinstance(namespace, str) and not set("{}") & set(namespace)  # which enclose the id of a user
        expect(fits, "namespace", "a string without braces", repr(namespace))
        self._arguments = (url, schema, cluster, namespace, options)
        self._namespace = namespace.encode()
        try:
            self._client = url() if callable(url) else _client(url, cluster, options)
        except UNAVAILABLE as error:
            raise _store_error(error) from error
        self._cluster = ClusterPipeline(self._client) if isinstance(self._client, redis.RedisCluster) else None
        decodes = self._client.get_encoder().decode_responses
        expect(not decodes, "decode_responses", "False: states are bytes", decodes)

    def close(self) -> None:
        self._client.close()

    def __reduce__(self):
        return _connect, self._arguments

    def _read(self, ids: np.ndarray, kinds: Sequence[Kind]) -> tuple[list[Unpacked], dict[int, Exception]]:
        read, unread = [], {}
        for kind in kinds:
            answers = self._get_records(self._keys(ids, kind))
            unread |= {position: answer for position, answer in enumerate(answers) if isinstance(answer, UNAVAILABLE)}
            records = [None if isinstance(answer, UNAVAILABLE) else answer for answer in answers] if unread else answers
            read.append(self._formats[kind].unpack(ids, records))
        return read, unread

    def _read_headers(self, ids: np.ndarray) -> list[Buffer | None]:
        keys = self._keys(ids, Kind.STATE)
        commands = [("GETRANGE", key, 0, HEADER.itemsize - 1) for key in keys]
        return [head or None for head in self._run(keys, commands)]

    def _write(self, ids: np.ndarray, records: list[np.ndarray], marks: Marks) -> np.ndarray:
        states, histories = records[0], records[1] if len(records) > 1 else None
        keys, history_keys = self._keys(ids, Kind.STATE), self._keys(ids, Kind.HISTORY)
        commands = []
        for position, key in enumerate(keys):
            state, expires = states[position].data, int(marks.expires[position])
            if histories is None and marks.replaces is None:  # the script takes Redis 50 us, a SET 3
                commands.append(("SET", key, state, *(("EXAT", expires) if expires else ())))
                continue
            history = b"" if histories is None else histories[position].data
            version = b"" if marks.replaces is None else marks.replaces[position].astype("<i8").tobytes()
            commands.append(("EVAL", PUT, 2, key, history_keys[position], state, history, expires, version))
        per_user = sum(record.shape[1] for record in records)
        batch = max(1, BATCH_BYTES // per_user)
        # A transaction waits for the disk once, if Redis is set up to wait for it.
        return np.array(self._run(keys, commands, batch=batch, transaction=True), bool)

    def _delete(self, ids: np.ndarray) -> int:
        keys = self._keys(ids, Kind.STATE)
        commands = [("DEL", *pair) for pair in zip(keys, self._keys(ids, Kind.HISTORY), strict=True)]
        return sum(map(bool, self._run(keys, commands)))

    def _keys(self, ids: np.ndarray, kind: Kind) -> list[bytes]:
        suffix = b":history" if kind == Kind.HISTORY else b""
        return [b"%b:{%d}%b" % (self._namespace, user, suffix) for user in ids.tolist()]

    def _get_records(self, keys: list[bytes]) -> list[Any]:
        """The record under each key, None, or an error of UNAVAILABLE."""
        if self._cluster is not None:
            answers = self._cluster.run(keys, [("GET", key) for key in keys])
        else:
            try:
                return self._client.mget(keys) if keys else []
            except UNAVAILABLE as error:
                return [error] * len(keys)
            except redis.RedisError as error:
                raise _store_error(error) from error
        _raise_errors([answer for answer in answers if not isinstance(answer, UNAVAILABLE)])
        return answers

    def _run(
        self, keys: list[bytes], commands: list[tuple], *, batch: int = 1024, transaction: bool = False
    ) -> list[Any]:
        """The answers to commands, each on the key beside it. In a cluster no batch is a transaction."""
        answers = []
        for start in range(0, len(commands), batch):
            part = slice(start, start + batch)
            if self._cluster is not None:
                answers += _raise_errors(self._cluster.run(keys[part], commands[part]))
            elif transaction:  # not redis-py's, which puts the command, with the state, before the message of an error
                answers += _raise_errors(self._pipeline([("MULTI",), *commands[part], ("EXEC",)])[-1])
            else:
                answers += self._pipeline(commands[part])
        return answers

    def _pipeline(self, commands: list[tuple]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        try:
            return _raise_errors(pipeline.execute(raise_on_error=False))
        except UNAVAILABLE as error:
            raise _store_error(error) from error


def _connect(url, schema: StateSchema, cluster: bool, namespace: str, options: dict[str, Any]) -> RedisStore:
    return RedisStore(url, schema, cluster=cluster, namespace=namespace, **options)


def _client(url: str, cluster: bool, options: dict[str, Any]) -> Any:
    limits: dict[str, Any] = {"socket_timeout": 1.0, "socket_connect_timeout": 1.0}
    if cluster:
        return redis.RedisCluster.from_url(url, **({"retry": Retry(NoBackoff(), 3)} | limits | options))
    return redis.Redis.from_url(url, **(limits | options))


def _raise_errors(answers: list[Any]) -> list[Any]:
    for answer in answers:
        if isinstance(answer, Exception):
            raise _store_error(answer) from answer
    return answers


def _store_error(error: Exception) -> StoreError:
    message = str(error)
    if isinstance(error, UNAVAILABLE) or message.startswith("NOREPLICAS"):  # fewer than min-replicas-to-write
        return StoreUnavailableError(f"Redis is not available: {message}")
    if isinstance(error, redis.OutOfMemoryError) or message.startswith("MISCONF"):
        return StoreFullError(f"Redis has no room: {message}")
    return StoreError(f"Redis refused a command: {message}")

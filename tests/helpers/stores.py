"""States in every engine: what the tests of the stores share."""

import uuid

import torch

from recattn.nn.lrea import LREAState
from recattn.serving import MemoryStore, StateSchema

H, R, D, DV, E = 2, 4, 8, 12, 6
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
ENGINES = ["memory", "lmdb", "redis", "cluster"]


def make_schema(dtype=torch.float32, *, rank=R, model="a model", embed_dim=0):
    return StateSchema(heads=H, rank=rank, dim=D, value_dim=DV, dtype=dtype, model=model, embed_dim=embed_dim)


def random_state(users, schema, dtype=torch.float32):
    """A state of `dtype`, with histories if the schema has them."""
    rows = (users, schema.heads, schema.rank)
    state = LREAState(torch.randn(*rows, D).to(dtype), torch.randn(*rows, DV).to(dtype), None, None)
    if not schema.appendable:
        return state
    compressed = torch.randn(users, schema.rank, schema.embed_dim)
    return state._replace(compressed=compressed, lengths=torch.randint(0, 100, (users,)))


def stamped_state(stamps, schema):
    """States of which every entry is the stamp of its user."""
    stamp = torch.tensor(stamps, dtype=torch.float32)
    state = random_state(len(stamps), schema)
    filled = {name: stamp.view(-1, *[1] * (x.dim() - 1)).expand_as(x).to(x.dtype) for name, x in named(state).items()}
    return state._replace(**filled)


def stamps_of(stored):
    """The stamp of each user, 0 for none. Fails if a state mixes two."""
    rows = torch.cat([tensor.unsqueeze(-1).flatten(1).float() for tensor in named(stored.state).values()], 1)
    assert bool((rows == rows[:, :1]).all()), "parts of two states"
    return rows[:, 0].long().tolist()


def named(state):
    return {name: tensor for name, tensor in state._asdict().items() if tensor is not None}


def rows_of(state, rows):
    return state._replace(**{name: tensor[rows] for name, tensor in named(state).items()})


def assert_same_bits(state, expected):
    given, expected = named(state), named(expected)
    assert given.keys() == expected.keys()
    for name, tensor in given.items():
        assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape, name
        assert torch.equal(tensor.contiguous().view(torch.uint8), expected[name].contiguous().view(torch.uint8)), name


class Engine:
    """Opens stores in one folder or namespace, and reads and writes its records as bytes.

    Args:
        place: folder of LMDB; URL of Redis.
    """

    def __init__(self, name, place=None):
        self.name, self.place = name, place
        self.namespace = uuid.uuid4().hex
        self.store = None

    def open(self, schema, **options):
        """A store. The one opened before is closed, as a folder of LMDB is open once in a process."""
        self.close()
        if self.name == "memory":
            self.store = MemoryStore(schema, capacity=1)
        elif self.name == "lmdb":
            from recattn.serving import LMDBStore

            self.store = LMDBStore(self.place, schema, **options)
        else:
            from recattn.serving import RedisStore

            # A machine that runs tests may be slow to answer.
            options = {"namespace": self.namespace, "socket_timeout": 30, "socket_connect_timeout": 30} | options
            self.store = RedisStore(self.place, schema, cluster=self.name == "cluster", **options)
        return self.store

    def close(self):
        if self.store is not None:
            self.store.close()

    def records(self):
        """All that the engine holds, bytes by key; of LMDB also the entries of expiries."""
        if self.name == "lmdb":
            databases = {**self.store._databases, "expiries": self.store._expiries}
            with self.store._env.begin() as txn:
                return {(name, key): record for name, own in databases.items() for key, record in txn.cursor(own)}
        client = self.store._client
        return {key: client.get(key) for key in client.scan_iter(f"{self.namespace}:*")}

    def write_record(self, user, record, history=False):
        """Put any bytes under a user's key."""
        if self.name == "lmdb":
            with self.store._env.begin(write=True) as txn:
                txn.put(user.to_bytes(8, "big"), record, db=self.store._databases[history])
        else:
            self.store._client.set(f"{self.namespace}:{{{user}}}{':history' * history}", record)

    def record(self, user, history=False):
        if self.name == "lmdb":
            with self.store._env.begin() as txn:
                return txn.get(user.to_bytes(8, "big"), db=self.store._databases[history])
        return self.store._client.get(f"{self.namespace}:{{{user}}}{':history' * history}")

"""What `benchmarks.serving` measures: a row per build, per store under load, and per fault and setting."""

from dataclasses import dataclass, field

P99_GOAL = 2.0  # get_many's p99 over that of the store's own floor


@dataclass(kw_only=True)
class StateBuild:
    """`build_states` of all users into an LMDBStore, and a table loaded with all of them."""

    built_by: str  # "parquet" or "ray"
    users: int
    behaviors: float  # of a user, mean
    build_s: float
    load_s: float  # from the store into a StateTable, through a StateCache
    disk_mb: float
    equal: bool  # to the direct computation, bit for bit


@dataclass(kw_only=True)
class StoreLoad:
    """A store under load. Times are of single calls, in ms, by percentile: "p50", "p99", "p99.9"."""

    load_of: str  # the store
    users: int
    record_bytes: int
    clients: int
    capacity: int  # users in each client's cache
    max_age: float  # of the caches, in seconds
    zipf: float  # exponent of the users' and items' popularity
    written_per_s: float  # users, by put_many
    rewritten_per_s: float  # users, during the load
    floor_alone_ms: dict[str, float]  # by one process, before the load
    get_many_alone_ms: dict[str, float]
    floor_ms: dict[str, float]
    get_many_ms: dict[str, float]
    request_ms: dict[str, float]
    reads_alone: int  # calls in the percentiles of get_many, and of the floor
    reads: int
    requests: int
    targets: float  # of a request, mean
    requests_per_s: float  # by all clients, over the time that they spend in requests
    hit_rate: float
    client_mb: float  # memory that a client has to itself, the largest
    engine_mb: float  # Redis' used_memory
    disk_mb: float
    wrong_answers: int
    lost_writes: int

    @property
    def as_expected(self) -> bool:
        return not (self.wrong_answers or self.lost_writes)


@dataclass(kw_only=True)
class Fault:
    """A fault under load. Counts of requests are those of all threads, before, during and after it."""

    fault_of: str  # the store
    fault: str
    setting: str  # of the StateCache or store
    outcome: str
    answers: int = 0
    wrong_answers: int = 0  # to a user in a request
    missing: int = 0  # users served as without a state, who have one
    lost_writes: int = 0  # acknowledged, by user
    errors: dict[str, int] = field(default_factory=dict)  # requests and writes that raised, by class
    back_s: float | None = None  # from the engine's restart to the first whole answer
    as_expected: bool = True

"""State of a ranking service: stores that hold the states of all users, and a table of those read in place."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from recattn.serving.slot_map import SlotMap
from recattn.serving.state_table import Request, StateTable

if TYPE_CHECKING:
    from recattn.serving.events import AppendedEvents, append_events
    from recattn.serving.scorer import export_scorer
    from recattn.serving.state_builder import BuildProgress, build_states
    from recattn.serving.state_cache import StateCache
    from recattn.serving.stores.lmdb import LMDBStore
    from recattn.serving.stores.memory import MemoryStore
    from recattn.serving.stores.redis import RedisStore
    from recattn.serving.stores.schema import StateSchema
    from recattn.serving.stores.store import (
        StateInfo,
        StateRefusedError,
        StateStore,
        StoredStates,
        StoreError,
        StoreFullError,
        StoreUnavailableError,
    )

# Imported when used: `import recattn` stays quick, and the libraries of some are extras.
_NAMES = {
    "events": ("AppendedEvents", "append_events"),
    "scorer": ("export_scorer",),
    "state_builder": ("BuildProgress", "build_states"),
    "state_cache": ("StateCache",),
    "stores.lmdb": ("LMDBStore",),
    "stores.memory": ("MemoryStore",),
    "stores.redis": ("RedisStore",),
    "stores.schema": ("StateSchema",),
    "stores.store": (
        "StateInfo",
        "StateRefusedError",
        "StateStore",
        "StoreError",
        "StoreFullError",
        "StoreUnavailableError",
        "StoredStates",
    ),
}
_MODULES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}

__all__ = [
    "AppendedEvents",
    "BuildProgress",
    "LMDBStore",
    "MemoryStore",
    "RedisStore",
    "Request",
    "SlotMap",
    "StateCache",
    "StateInfo",
    "StateRefusedError",
    "StateSchema",
    "StateStore",
    "StateTable",
    "StoreError",
    "StoreFullError",
    "StoreUnavailableError",
    "StoredStates",
    "append_events",
    "build_states",
    "export_scorer",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""State of a ranking service: stores that hold the states of all users, and a table of those read in place."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from recattn.serving.events import AppendedEvents, append_events
from recattn.serving.slot_map import SlotMap
from recattn.serving.state_builder import BuildProgress, build_states
from recattn.serving.state_cache import StateCache
from recattn.serving.state_table import Request, StateTable
from recattn.serving.stores.memory import MemoryStore
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

if TYPE_CHECKING:
    from recattn.serving.scorer import export_scorer
    from recattn.serving.stores.lmdb import LMDBStore
    from recattn.serving.stores.redis import RedisStore

# Imported when used: their libraries are extras.
_OF_EXTRAS = {
    "LMDBStore": "recattn.serving.stores.lmdb",
    "RedisStore": "recattn.serving.stores.redis",
    "export_scorer": "recattn.serving.scorer",
}

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
    if name in _OF_EXTRAS:
        return getattr(import_module(_OF_EXTRAS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""State of a ranking service: a table of user states, and the map from user ids to its rows."""

from recattn.serving.slot_map import SlotMap
from recattn.serving.state_table import Request, StateTable

__all__ = ["Request", "SlotMap", "StateTable"]

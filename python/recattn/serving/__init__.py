"""What a ranking service keeps: a table of users' states, and who lies where in it."""

from recattn.serving.slot_map import SlotMap
from recattn.serving.state_table import Request, StateTable

__all__ = ["Request", "SlotMap", "StateTable"]

"""SlotMap (C++, csrc/slot_map), or a placeholder if it was not compiled."""

from recattn._extension import MISSING

try:
    from recattn._slot_map import SlotMap
except ImportError as error:
    _REASON = MISSING.get("cpu", str(error))

    class SlotMap:
        """Placeholder that raises when constructed, so that recattn imports without its compiled parts."""

        def __init__(self, capacity: int) -> None:
            raise NotImplementedError(f"SlotMap is not available: {_REASON}")


__all__ = ["SlotMap"]

"""SlotMap (C++, csrc/host), or what stands for it where it was not compiled."""

from recattn._extension import MISSING

try:
    from recattn._host import SlotMap
except ImportError as error:
    _WHY = MISSING.get("cpu", str(error))

    class SlotMap:
        """Says why it is missing when it is made: recattn imports without its compiled parts."""

        def __init__(self, capacity: int) -> None:
            raise NotImplementedError(f"SlotMap is not available: {_WHY}")


__all__ = ["SlotMap"]

"""What a call costs on the host, made cheap by C++ (csrc/host). Without it calls are right too, and slower."""

from torch import Tensor
from torch.nn import Parameter

try:
    from recattn._host import all_plain, make_launch, sizes
except ImportError:  # not compiled

    def all_plain(args: tuple) -> bool:
        """Whether no tensor among `args` is of a subclass or on the meta device."""
        tensors = (x for x in args if isinstance(x, Tensor))
        return all(type(x) in (Tensor, Parameter) and not x.is_meta for x in tensors)

    def sizes(layouts: bytes, *tensors: Tensor | None) -> None:
        """Nothing is known of the tensors: the caller checks them."""

    make_launch = None

__all__ = ["all_plain", "make_launch", "sizes"]

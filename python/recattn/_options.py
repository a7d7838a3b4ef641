"""The options of each operator, in one tuple from the public function to the kernel launch.

The public function builds the tuple. It is splatted into the arguments of a `torch.library` operator, whose kernels
rebuild it.
"""

from typing import NamedTuple


class SinkAttentionOptions(NamedTuple):
    """Options of sink_attention.

    `impl` and `backend` are those of the public function: None lets the dispatch table choose.
    """

    causal: bool
    left_padded: bool
    scale: float
    dropout_p: float = 0.0
    max_seqlen: int | None = None
    impl: str | None = None
    backend: str | None = None

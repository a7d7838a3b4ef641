"""The options of each operator, in one tuple from the public function to the kernel launch.

The public function builds the tuple. It is splatted into the arguments of a `torch.library` operator, whose kernels
rebuild it.
"""

from typing import NamedTuple

from recattn._typing import Mechanism, Source


class SinkAttentionOptions(NamedTuple):
    """Options of sink_attention.

    `impl` and `backend` are the two parts of the public `impl`, such as "correction:flash". None: the dispatch table
    chooses.
    """

    causal: bool
    scale: float
    dropout_p: float = 0.0
    max_seqlen: int | None = None
    impl: str | None = None
    backend: str | None = None


class InterSinkBiasOptions(NamedTuple):
    """Options of inter_sink_bias. `impl`: "cpu" runs the C++ kernels, anything else the Triton kernels."""

    factor: float  # multiplies the bias; bias_scale itself where that is a number
    causal: bool
    dropout_p: float
    scale: float | None  # None for 1/√D: computed outside the operator, torch.compile would fix it in the graph
    impl: str | None = None


class LreaAttentionOptions(NamedTuple):
    """Options of lrea_attention. `path`: "triton" runs the Triton kernels, "auto" only on a GPU."""

    negative_slope: float
    scale: float | None  # None for 1/√d: computed outside the operator, torch.compile would fix it in the graph
    path: str


class LreaCompressOptions(NamedTuple):
    """Options of lrea_compress; `path` as in LreaAttentionOptions."""

    max_seqlen: int | None
    path: str


class RefinedAttentionOptions(NamedTuple):
    """Options of refined_attention.

    `scale` None is 1/√D, which torch.compile would fix in its graph were it computed outside the operator. `impl` is
    the implementation that serves the call.
    """

    mechanism: Mechanism
    source: Source
    causal: bool
    scale: float | None
    dropout_p: float = 0.0
    max_seqlen: int | None = None
    impl: str | None = None


class WassersteinAttentionOptions(NamedTuple):
    """Options of wasserstein_attention; see RefinedAttentionOptions.

    `max_seqlen`: bound of the lengths of packed sequences; None: T.
    `refined`: cov_q and cov_k are x of Σ = elu(x) + 1, as a refinement's matrices give them.
    """

    source: Source
    causal: bool
    scale: float | None
    dropout_p: float = 0.0
    max_seqlen: int | None = None
    impl: str | None = None
    refined: bool = False

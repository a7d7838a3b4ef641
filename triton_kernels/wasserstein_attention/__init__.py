"""wasserstein_attention: a kernel that makes vectors, one flash attention kernel forward and two backward; of short
sequences in half precision (short.py) one kernel forward and one backward, which make the vectors themselves.

The distance of two Gaussians with diagonal covariances is the distance of the vectors [μ, √Σ].

q    = [mean_q, √cov_q] - centre        centre = the mean of [mean_k, √cov_k] over the keys: no distance changes, and
k    = [mean_k, √cov_k] - centre        the products below do not cancel where all vectors share an offset
qk   = scale · (2 q · k - ‖k‖²)         -scale · ‖q - k‖² up to the query's own term, which changes no softmax
p    = softmax(mask(qk))
mean = p @ mean_v                       online: an accumulator is scaled by row_scale,
cov  = (p ∘ p) @ cov_v                  that of the squares by row_scale²

delta = dmean·mean + 2 dcov·cov         of each row
ds    = p ∘ (dmean @ mean_v.T + 2 p ∘ (dcov @ cov_v.T) - delta)
dq    = 2 scale · (ds @ k - rowsum(ds) q)       dk      = 2 scale · (ds.T @ q - colsum(ds) k)
dmean_v = p.T @ dmean                           dcov_v  = (p ∘ p).T @ dcov
dmean_q = dq[:, :D]                             dcov_q  = dq[:, D:] / (2 √cov_q)

With REFINED, cov_q and cov_k are x of Σ = elu(x) + 1, and √Σ - 1 takes the place of √Σ.
"""

from recattn.triton_kernels.common.ragged import as_lengths
from recattn.triton_kernels.wasserstein_attention.backward import launch_wasserstein_attention_bwd
from recattn.triton_kernels.wasserstein_attention.config import is_short
from recattn.triton_kernels.wasserstein_attention.factors import (
    factors_width,
    launch_wasserstein_factors_bwd,
    launch_wasserstein_factors_fwd,
)
from recattn.triton_kernels.wasserstein_attention.forward import launch_wasserstein_attention_fwd
from recattn.triton_kernels.wasserstein_attention.shared import Forward
from recattn.triton_kernels.wasserstein_attention.short import (
    launch_wasserstein_attention_short_bwd,
    launch_wasserstein_attention_short_fwd,
)
from recattn.triton_kernels.wasserstein_attention.vectors import launch_wasserstein_attention_vectors

__all__ = [
    "Forward",
    "as_lengths",
    "factors_width",
    "is_short",
    "launch_wasserstein_attention_bwd",
    "launch_wasserstein_attention_fwd",
    "launch_wasserstein_attention_short_bwd",
    "launch_wasserstein_attention_short_fwd",
    "launch_wasserstein_attention_vectors",
    "launch_wasserstein_factors_bwd",
    "launch_wasserstein_factors_fwd",
]

"""wasserstein_attention: one flash attention kernel forward and two backward.

qk   = scale · (2 q · k - ‖k‖²)         -scale · ‖q - k‖² up to the query's own term, which changes no softmax
p    = softmax(mask(qk))
mean = p @ mean_v                       online: an accumulator is scaled by row_scale,
cov  = (p ∘ p) @ cov_v                  that of the squares by row_scale²

delta = dmean·mean + 2 dcov·cov         of each row
ds    = p ∘ (dmean @ mean_v.T + 2 p ∘ (dcov @ cov_v.T) - delta)
dq    = 2 scale · (ds @ k - rowsum(ds) q)       dk      = 2 scale · (ds.T @ q - colsum(ds) k)
dmean_v = p.T @ dmean                           dcov_v  = (p ∘ p).T @ dcov
"""

"""refined_attention: short sequences in one program, and the projection x = A W of longer ones.

short.py              the forward of short sequences
short_backward.py     their backward; its equations are in short_gradients.py
short_weights.py      G = W_q W_kᵀ / √R before, and dW_q, dW_k and dW_v after
projection.py         the launches of x = A W; the kernels are in projection_kernels.py
config.py             tile sizes, warps and pipeline stages
"""

from recattn.triton_kernels.refined_attention.config import LARGEST_HEAD_DIM, largest_n
from recattn.triton_kernels.refined_attention.projection import (
    Batch,
    launch_refined_projection_bwd,
    launch_refined_projection_fwd,
)
from recattn.triton_kernels.refined_attention.short import batch_sizes, launch_refined_attention_fwd
from recattn.triton_kernels.refined_attention.short_backward import launch_refined_attention_bwd
from recattn.triton_kernels.refined_attention.short_weights import launch_weights_bwd, launch_weights_product

__all__ = [
    "LARGEST_HEAD_DIM",
    "Batch",
    "batch_sizes",
    "largest_n",
    "launch_refined_attention_bwd",
    "launch_refined_attention_fwd",
    "launch_refined_projection_bwd",
    "launch_refined_projection_fwd",
    "launch_weights_bwd",
    "launch_weights_product",
]

"""Every kernel launched by the public calls, as far as a CPU goes: prints each call's launches as JSON.

python tests/triton/every_launch.py --sequences 70000 --packed 100000    the grids of large batches
python tests/triton/every_launch.py --compile    compiles what the launches ask for: compile_launches.py
python tests/triton/every_launch.py --repeats 3    fails where a later call does not launch what the first did
python tests/triton/every_launch.py --checks    the calls of `python -m recattn check --device cuda` instead
python tests/triton/every_launch.py --time    prints the CPU time that each call takes of the host instead
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # for tests.*, where this file is run as a script
os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch import Tensor

import recattn
from benchmarks.harness import dry_driver, host_time
from recattn._options import SinkAttentionOptions
from recattn.checks.cases import OPERATORS, Case, Operator
from recattn.checks.supervisor import DTYPES
from recattn.ops import sink_attention as sink_ops
from recattn.ops.backends import BACKENDS, AttentionBackend
from tests.triton.compile_launches import Requests

REPEATS = 20

sink_attention = functools.partial(recattn.sink_attention, impl="triton")
inter_sink_bias = functools.partial(recattn.inter_sink_bias, impl="triton")
refined_attention = functools.partial(recattn.refined_attention, impl="triton")
wasserstein_attention = functools.partial(recattn.wasserstein_attention, impl="triton")
lrea_compress = functools.partial(recattn.lrea_compress, impl="triton")
lrea_attention = functools.partial(recattn.lrea_attention, impl="triton")


class DryBackend(AttentionBackend):
    """What no GPU is needed for: an attention that computes nothing, of any batch, to be corrected."""

    def unsupported_reason(self, call) -> None:
        return None


BACKENDS["dry"] = DryBackend(
    "dry",
    lambda call: None,
    lambda q, k, v, settings: (v.new_empty(*q.shape[:-1], v.shape[-1]), _empty_lse(q)),
    lambda dout, q, k, v, *_: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)),
    deterministic=True,
)


def _empty_lse(q: Tensor) -> Tensor:
    return q.transpose(-3, -2).new_empty(*q.shape[:-3], q.shape[-2], q.shape[-3], dtype=torch.float32)


def corrected_attention(q, k, v, sink_positions, inter_sink_bias, *, sink_logits=None, cu_seqlens=None) -> Tensor:
    """sink_attention by its correction path; the public call needs a GPU's attention for it."""
    options = SinkAttentionOptions(True, 0.25, 0.0, 2, "correction", "dry")
    tensors = (sink_positions, inter_sink_bias, sink_logits, None, None, cu_seqlens, None)
    return sink_ops.SinkAttentionFunction.apply(q, k, v, *tensors, options)[0]


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Ones, expanded from a single number in memory, with a gradient."""
    return torch.ones((), dtype=dtype).expand(shape).requires_grad_()


def train(function: Callable, inputs: dict[str, Tensor], **options) -> None:
    """Run a call and its backward."""
    outs = function(**inputs, **options)
    outs = outs if isinstance(outs, tuple) else (outs,)
    leaves = [x for x in inputs.values() if x.requires_grad]
    torch.autograd.grad(outs, leaves, [torch.empty_like(out) for out in outs])


def calls(sequences: int, packed: int) -> dict[str, Callable[[], None]]:
    """Calls on `sequences` short sequences, or `packed` ones, that reach every kernel and change its code or grid."""
    B, integers = sequences, {"dtype": torch.int64}
    lengths, offsets = torch.ones(B, **integers), torch.arange(0, 2 * B + 1, 2)
    seed_and_padding = {"dropout_p": 0.1, "seq_lens": lengths, "padding_side": "left"}

    dense = {"q": leaf(B, 2, 2, 16), "k": leaf(B, 1, 2, 16), "v": leaf(B, 1, 2, 16)}
    dense |= {"sink_positions": torch.arange(2).expand(B, 2), "inter_sink_bias": leaf(B, 1, 2, 2)}
    tokens = {"q": leaf(2 * packed, 2, 16), "k": leaf(2 * packed, 1, 16), "v": leaf(2 * packed, 1, 16)}
    tokens |= {"sink_positions": torch.arange(2).expand(packed, 2), "inter_sink_bias": leaf(packed, 2, 2, 2)}
    tokens |= {"cu_seqlens": torch.arange(0, 2 * packed + 1, 2)}
    logits = {"sink_logits": leaf(2)}

    sinks = {"q_s": leaf(B, 2, 3, 16), "k_s": leaf(B, 2, 3, 16)}
    many_sinks = {name: leaf(B, 1, 65, 16, dtype=torch.float32) for name in sinks}
    options = {"sink_mask": torch.ones(B, 3, dtype=torch.bool), "bias_scale": leaf(1)}

    def refined(N: int, matrices: int = 2, sequences: int = B, **options) -> dict[str, Tensor]:
        inputs = {name: leaf(sequences, 1, N, 16, **options) for name in "qkv"}
        return inputs | {f"w_{name}": leaf(N, N, **options) for name in "qkv"[:matrices]}

    packed_refined = {name: leaf(2 * packed, 2, 16) for name in "qkv"} | {"w_q": leaf(3, 4), "w_k": leaf(3, 4)}

    names = ("mean_q", "cov_q", "mean_k", "cov_k", "mean_v", "cov_v")
    gaussians, long_gaussians = ({name: leaf(B, 1, N, 8) for name in names} for N in (2, 129))
    packed_gaussians = {name: leaf(2 * packed, 1, 8) for name in names}
    packed_gaussians |= {"cu_seqlens": tokens["cu_seqlens"]}
    matrices = {"w_q": leaf(2, 2), "w_k": leaf(2, 2)}

    histories = {"behaviors": leaf(B, 3, 16), "w_comp": leaf(3, 16)}
    packed_histories = {"behaviors": leaf(2 * B, 16), "w_comp": leaf(3, 16), "cu_seqlens": offsets}
    table = {"behaviors": torch.ones(5, 16), "w_comp": torch.ones(3, 16), "item_ids": torch.zeros(B, 3, **integers)}
    states = {name: leaf(B, 2, 16, 16) for name in ("keys", "values")}
    targets = {"targets": leaf(2 * B, 2, 16), **states, "w_decomp": leaf(16, 3), "target_offsets": offsets}
    # Histories so long that users are sorted, and their columns split.
    few_targets = {"targets": leaf(4, 2, 16), "keys": leaf(2, 2, 16, 16), "values": leaf(2, 2, 16, 16)}
    few_targets |= {"w_decomp": leaf(16, 2**21), "target_offsets": offsets[:3]}

    return {
        "sink_attention": lambda: train(sink_attention, dense | logits, causal=True),
        "sink_attention, by the choice of a GPU": lambda: train(recattn.sink_attention, dense),
        "sink_attention of padding, with dropout": lambda: train(sink_attention, dense, **seed_and_padding),
        "sink_attention, packed": lambda: train(sink_attention, tokens | logits, causal=True),
        "sink_attention, corrected": lambda: train(corrected_attention, dense | logits),
        "sink_attention, corrected and packed": lambda: train(corrected_attention, tokens | logits),
        "inter_sink_bias": lambda: train(inter_sink_bias, sinks | options, causal=True, dropout_p=0.1),
        "inter_sink_bias of many sinks": lambda: train(inter_sink_bias, many_sinks),
        "refined_attention": lambda: train(refined_attention, refined(2)),
        "refined_attention, additive": lambda: train(
            refined_attention, refined(20, 3), mechanism="additive", **seed_and_padding
        ),
        "refined_attention, packed": lambda: train(refined_attention, packed_refined, cu_seqlens=tokens["cu_seqlens"]),
        "refined_attention of many sequences": lambda: train(refined_attention, refined(2, sequences=40)),
        "refined_attention in three launches": lambda: train(
            refined_attention, refined(100, 3), mechanism="value", source="weights"
        ),
        "refined_attention of long sequences": lambda: train(refined_attention, refined(129)),
        "wasserstein_attention": lambda: train(wasserstein_attention, gaussians, **seed_and_padding),
        "wasserstein_attention of long sequences": lambda: train(
            wasserstein_attention, long_gaussians, **seed_and_padding
        ),
        "wasserstein_attention, refined": lambda: train(wasserstein_attention, gaussians | matrices),
        "wasserstein_attention, packed": lambda: train(wasserstein_attention, packed_gaussians | matrices),
        "wasserstein_attention, packed and short": lambda: train(wasserstein_attention, packed_gaussians, max_seqlen=2),
        "lrea_compress": lambda: train(lrea_compress, histories, seq_lens=lengths),
        "lrea_compress, packed": lambda: train(lrea_compress, packed_histories),
        "lrea_compress by item id": lambda: lrea_compress(**table),
        "lrea_attention": lambda: train(lrea_attention, targets),
        "lrea_attention of ragged histories": lambda: train(lrea_attention, targets, seq_lens=lengths),
        "lrea_attention of long histories": lambda: train(lrea_attention, few_targets, seq_lens=lengths[:2]),
    }


def checked_calls() -> dict[str, Callable[[], None]]:
    """The calls of the check on a GPU: each case in each dtype, by the Triton kernels."""
    return {
        f"{operator.name} {case.name} {dtype}": functools.partial(check, operator, case, dtype)
        for operator in OPERATORS.values()
        if "triton" in operator.implementations("cuda")
        for dtype in DTYPES["cuda"]
        for case in operator.cases("cuda", dtype)
    }


def check(operator: Operator, case: Case, dtype: torch.dtype) -> None:
    inputs = case.draw(dtype)
    leaves = [inputs[name].requires_grad_() for name in case.grads]
    try:
        outs = operator.function(**inputs, **case.hints, impl="triton")
    except NotImplementedError:
        return
    outs = outs if isinstance(outs, tuple) else (outs,)
    if leaves:
        torch.autograd.grad(outs, leaves, [torch.empty_like(out) for out in outs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--packed", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checks", action="store_true")
    parser.add_argument("--time", action="store_true")
    options = parser.parse_args()

    requests = Requests()
    launches = dry_driver.install(requests.add)
    made = {}
    chosen = checked_calls() if options.checks else calls(options.sequences, options.packed)
    for name, call in chosen.items():
        launches.clear()
        call()
        first = list(launches)
        for _ in range(options.repeats):
            launches.clear()
            call()
            if launches != first:
                sys.exit(f"{name} launched {launches}, and {first} the first time")
        made[name] = list(dict.fromkeys(launches))  # a backward may repeat one a thousand times
        if options.time:
            print(f"{host_time.best_us(call, REPEATS):6.0f} µs  {name}", flush=True)
    if options.compile:
        made = {"launches": made, "compiled": list(requests.compile(10 * dry_driver.DEVICE.major))}
    if not options.time:
        print(json.dumps(made))


if __name__ == "__main__":
    main()

"""Calls during which another thread writes to the index tensors. Run it in a process of its own: a fault crashes it.

python tests/helpers/racing_indices.py SECONDS [LIBRARY]    every operator, or the C++ operators of a library
"""

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # for tests.*, where this file is run as a script

import torch
from torch import Tensor


def race(call: Callable[[], object], indices: dict[str, Tensor], seconds: float) -> tuple[int, int]:
    """How many calls returned, and how many refused the indices. Any other error is raised."""
    good = {name: x.clone() for name, x in indices.items()}
    # Just outside, and where no memory is.
    bad = {name: x.clone() for name, x in indices.items()}
    for x in bad.values():
        x.flatten()[::2] += 40
        x.flatten()[1::2] = torch.iinfo(x.dtype).max
    over = threading.Event()

    def write():
        while not over.is_set():
            for state in (bad, good):
                for name, x in indices.items():
                    x.copy_(state[name])

    writer = threading.Thread(target=write)
    writer.start()
    returned = refused = 0
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end or not (returned and refused):
            try:
                call()
                returned += 1
            except ValueError:
                refused += 1
            assert time.monotonic() < end + 60, "no call returned, or none refused"
    finally:
        over.set()
        writer.join()
    return returned, refused


def every_operator(seconds: float) -> None:
    from tests.helpers.operator_cases import CASES, INDICES

    for name, case in CASES.items():
        if case.options.get("impl") == "triton":  # the interpreter holds the GIL
            continue
        inputs = case.inputs()
        indices = {index: inputs[index] for index in INDICES if index in inputs}
        print(name, *race(lambda case=case, inputs=inputs: case.function(**inputs), indices, seconds))


def operators_of_library(library: str, seconds: float) -> None:
    torch.ops.load_library(library)
    users, items, rank, dim = 64, 8, 4, 16
    table, w = torch.randn(100, 2, dim), torch.randn(items, rank)
    state = torch.randn(50, 2, rank, dim)
    slots, offsets = torch.randint(50, (users,)), torch.arange(users + 1) * items
    ids = torch.randint(100, (users * items,))

    def attend():
        torch.ops.recattn.lrea_absorbed_attention(table, state, state, slots, offsets, 0.01, ids, None, None)

    def count():
        counter = torch.zeros(1, dtype=torch.int64)
        operator = torch.ops.recattn.lrea_absorbed_attention.counting
        operator(table, state, state, slots, offsets, 0.01, ids, None, None, counter)
        if counter.item():
            raise ValueError("counted")

    histories, lengths = ids.view(users, items).clone(), torch.randint(1, items + 1, (users,))

    def compress():
        torch.ops.recattn.lrea_compress(table[:, 0], w, lengths, None, histories)

    w_decomp = torch.randn(rank, items)

    def restore():
        tensors = (table, state, state, w_decomp, hundred, longest)
        out, *saved = torch.ops.recattn.lrea_restored_fwd(*tensors, 0.01, None)
        torch.ops.recattn.lrea_restored_bwd(out, *tensors, *saved, 0.01, None)

    hundred, longest = torch.arange(51) * 2, torch.randint(1, items + 1, (50,), dtype=torch.int32)
    positions = torch.tensor([[1, 3, -1]] * 20)

    def check_values():
        torch.ops.recattn.checked_lengths_cpu("seq_lens", lengths, items)
        torch.ops.recattn.checked_offsets_cpu("target_offsets", offsets, users * items)
        torch.ops.recattn.checked_rows_cpu("item_ids", histories, 100, lengths)
        torch.ops.recattn.checked_sink_positions_cpu(positions, 30, None)

    sinks, bias = positions[:6].clone(), torch.randn(6, 1, 3, 3)
    packed, padded = torch.randn(48, 2, dim), torch.randn(6, 2, items, dim)
    sixth, sequence_lengths = torch.arange(7) * items, torch.randint(1, items + 1, (6,), dtype=torch.int32)
    starts = items - sequence_lengths

    def attend_sinks(tokens, seq_lens, seq_starts, cu_seqlens):
        others = (sinks, bias, None, seq_lens, seq_starts, cu_seqlens, None, True, 0.25, 0.0)
        out, _, row_stats = torch.ops.recattn.sink_attention_cpu_fwd(tokens, tokens, tokens, *others)
        torch.ops.recattn.sink_attention_cpu_bwd(out, tokens, tokens, tokens, out, row_stats, *others)

    served = {"slots": slots, "target_offsets": offsets, "item_ids": ids}
    print("attend", *race(attend, served, seconds))
    print("count", *race(count, served, seconds))
    of_sinks = {"positions": sinks, "cu_seqlens": sixth}
    print("packed sinks", *race(lambda: attend_sinks(packed, None, None, sixth), of_sinks, seconds))
    of_sinks = {"positions": sinks, "seq_lens": sequence_lengths, "seq_starts": starts}
    print("padded sinks", *race(lambda: attend_sinks(padded, sequence_lengths, starts, None), of_sinks, seconds))
    print("restore", *race(restore, {"target_offsets": hundred, "seq_lens": longest}, seconds))
    checked = {"seq_lens": lengths, "target_offsets": offsets, "item_ids": histories, "positions": positions}
    print("check", *race(check_values, checked, seconds))
    print("compress", *race(compress, {"seq_lens": lengths, "item_ids": histories}, seconds))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if len(sys.argv) > 2:
        operators_of_library(sys.argv[2], float(sys.argv[1]))
    else:
        every_operator(float(sys.argv[1]))

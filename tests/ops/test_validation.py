"""recattn.validate: the values of index tensors, each message."""

import pytest
import torch

import recattn


def test_accepts_what_is_right():
    recattn.validate(
        sink_positions=torch.tensor([[0, 4, -1], [2, 3, 4], [-1, -1, -1]]), seq_lens=torch.tensor([5, 0, 3]), seq_len=5
    )
    recattn.validate(
        sink_positions=torch.tensor([[0, -1], [1, 2]], dtype=torch.int32),
        cu_seqlens=torch.tensor([0, 1, 4]),
        num_tokens=4,
    )
    recattn.validate(target_offsets=torch.tensor([0, 0, 7]), num_targets=7, slots=torch.tensor([3, 0]), num_slots=4)
    recattn.validate(sink_positions=torch.zeros(2, 0, dtype=torch.long), seq_len=5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"sink_positions": torch.tensor([[0, 5]]), "seq_len": 5},
            r"below the sequence length 5, got 5 at index \[0, 1\]",
        ),
        ({"sink_positions": torch.tensor([[-2, 1]]), "seq_len": 5}, "token positions, or -1 for padding, got -2"),
        (
            {"sink_positions": torch.tensor([[3, 3]]), "seq_len": 5},
            r"strictly ascending, padded with -1 at the end, got 3 at index \[0, 1\]",
        ),
        (
            {"sink_positions": torch.tensor([[-1, 3]]), "seq_len": 5},
            "strictly ascending, padded with -1 at the end, got 3",
        ),
        (
            {"sink_positions": torch.tensor([[1], [1]]), "cu_seqlens": torch.tensor([0, 1, 4]), "num_tokens": 4},
            r"below the sequence length of each sequence, got 1 at index \[0, 0\]",
        ),
        ({"seq_lens": torch.tensor([1, -1]), "seq_len": 5}, r"seq_lens must be between 0 and 5, got -1 at index \[1\]"),
        ({"cu_seqlens": torch.tensor([1, 4]), "num_tokens": 4}, "offsets from 0 to 4, got offsets from 1 to 4"),
        ({"target_offsets": torch.tensor([0, 3, 2, 4]), "num_targets": 4}, r"ascending, got 2 at index \[2\]"),
        ({"slots": torch.tensor([0, 4]), "num_slots": 4}, r"slots must be rows of a table of 4, got 4 at index \[1\]"),
        (
            {
                "item_ids": torch.tensor([[9, 1], [1, 9]]),
                "num_items": 4,
                "seq_lens": torch.tensor([0, 2]),
                "seq_len": 2,
            },
            r"item_ids must be rows of a table of 4, got 9 at index \[1, 1\]",
        ),
        ({"slots": torch.tensor([0])}, "num_slots must be given to check slots, got None"),
        ({"sink_positions": torch.tensor([0, 1]), "seq_len": 5}, r"sink_positions must be \[B, M\], got \[2\]"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int64), "num_tokens": 4}, r"cu_seqlens must be \[B\+1\], got no"),
        ({"slots": torch.tensor([0.0]), "num_slots": 4}, "slots must be int64 or int32, got float32"),
        ({"item_ids": [0, 1], "num_items": 4}, r"item_ids must be a torch\.Tensor, got list"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        recattn.validate(**arguments)


# --- As operators ---


def test_opcheck():
    lengths, offsets = torch.tensor([4, 0, 3]), torch.tensor([0, 4, 4, 7])
    positions = torch.tensor([[0, 3], [-1, -1], [1, 2]])
    rows = torch.randint(9, (3, 4))
    recattn_ops = torch.ops.recattn
    torch.library.opcheck(recattn_ops.checked_lengths.default, ["seq_lens", lengths, 4])
    torch.library.opcheck(recattn_ops.checked_offsets.default, ["target_offsets", offsets, 7])
    torch.library.opcheck(recattn_ops.checked_sink_positions.default, [positions, 5, None])
    torch.library.opcheck(recattn_ops.checked_sink_positions.default, [positions, None, offsets])
    torch.library.opcheck(recattn_ops.checked_rows.default, ["item_ids", rows, 9, lengths])
    left, right = torch.randn(5, 6), torch.randn(5, 6)
    torch.library.opcheck(recattn_ops.lrea_gram_fwd.default, [left, right, lengths])
    torch.library.opcheck(recattn_ops.lrea_gram_bwd.default, [torch.randn(3, 5, 5), left, right, lengths])

"""What RecBole reads, and its scores in our numbers. Its trainer runs in `make quality`, which installs it."""

import torch
from torch import nn

from benchmarks.data.movielens import Histories
from benchmarks.quality import sasrec_recbole
from benchmarks.quality.sasrec import TESTED


def test_what_recbole_reads(tmp_path):
    """All but the last items of the test, in our order: RecBole's test is our first, which it does not train on."""
    items = torch.tensor([9, 4, 7, 3, 5, 6, 8, 2])
    sasrec_recbole.write(Histories([items], ""), tmp_path)
    head, *rows = (tmp_path / "ordered" / "ordered.inter").read_text().splitlines()
    assert head.split("\t") == ["user_id:token", "item_id:token", "timestamp:float"]
    assert [row.split("\t") for row in rows] == [["0", str(x), str(i)] for i, x in enumerate([9, 4, 7, 3])]
    assert len(items) - len(rows) == TESTED - 1


class StandIn(nn.Module):
    """Like RecBole's models: items padded on the right with their lengths, in its own numbers. Echoes the last item."""

    def __init__(self, items):
        super().__init__()
        self.item_embedding = nn.Embedding.from_pretrained(torch.eye(items))

    def forward(self, sequences, lengths):
        assert ((sequences != 0).sum(1) == lengths).all()
        assert all((row[:n] != 0).all() for row, n in zip(sequences, lengths, strict=True))
        last = sequences.gather(1, lengths[:, None] - 1).squeeze(1)
        return self.item_embedding(last)


def test_scores_are_in_our_numbers():
    numbers = torch.tensor([0, 3, 1, 0, 2])  # RecBole's numbers of our items 0-4; item 3 was never seen
    sequences = torch.tensor([[0, 0, 1, 4], [0, 0, 0, 2], [4, 2, 4, 1], [0, 1, 3, 4], [1, 3, 2, 3]])
    scores = sasrec_recbole.Scores(StandIn(4), numbers).scores(sequences)
    assert scores.argmax(1).tolist() == [4, 2, 1, 4, 2]
    assert scores.shape == (5, 5) and (scores.sum(1) == 1).all()

"""Hypothesis strategies for the shapes that break attention kernels."""

from hypothesis import strategies as st

# Around tile edges, odd, and N % 128 == 64.
LENGTHS = (1, 2, 63, 64, 100, 129, 192)

lengths = st.sampled_from(LENGTHS)
seeds = st.integers(0, 2**31 - 1)


def ragged_lengths(longest: int, max_sequences: int = 5) -> st.SearchStrategy[list[int]]:
    """Lengths of a batch: empty, single, full and in between."""
    length = st.one_of(st.sampled_from((0, 1, longest)), st.integers(0, longest))
    return st.lists(length, min_size=1, max_size=max_sequences)

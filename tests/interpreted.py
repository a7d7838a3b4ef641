"""What tests of kernels that NumPy interprets share."""

from recattn.testing import assert_matches_reference


def assert_matches_reference_twice_of_three(*args, **kwargs) -> None:
    """`assert_matches_reference`, of three incoming gradients for two.

    The interpreter sums in NumPy's order and the reference in that of the processor's BLAS. Where a gradient is the
    small difference of large sums its largest error is one entry's luck: one right kernel in twenty is over its bound
    on one processor or another. What is wrong is over it every time, and an output's error is the same for all three.
    """
    try:
        assert_matches_reference(*args, **kwargs)
    except AssertionError:
        for seed in (1, 2):
            assert_matches_reference(*args, **kwargs, seed=seed)

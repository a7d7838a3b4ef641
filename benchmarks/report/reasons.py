"""Why a measured time differs from the prediction of `benchmarks.report.cost_model`, as profiles showed it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    why: str
    workloads: tuple[str, ...] = ()  # none: all workloads of the operator


NOT_PROFILED = Reason("Timed once on this GPU and not profiled yet: why it differs is not known.")

# By operator and type of device. The first reason that fits a workload applies.
REASONS: dict[tuple[str, str], tuple[Reason, ...]] = {
    ("sink_attention", "cpu"): (
        Reason(
            "The random bits of eight weights take ten rounds of integer multiplications. The model does not count "
            "them.",
            ("dropout",),
        ),
        Reason(
            "Below 512 tokens copies of keys and values, partial tiles and short rows of the softmax take a share of "
            "the time, and do not overlap with the matmuls. Where it is faster than predicted, tiles from the cache "
            "multiply faster than the large matmul that sets the ceiling, or the exponentials are faster than "
            "PyTorch's softmax."
        ),
    ),
    ("bert_layer", "cpu"): (
        Reason(
            "Three quarters of the time is matmuls with 768 and 3072 columns. They are slower than the square matmul "
            "that sets the ceiling."
        ),
    ),
    ("inter_sink_bias", "cpu"): (
        Reason(
            "A head has few sinks: partial tiles, transposed keys and short rows of the softmax do not overlap with "
            "the matmuls. The backward also maps the pages of its newly allocated gradients."
        ),
    ),
    ("refined_attention", "cpu"): (
        Reason(
            "Half the time the operating system maps pages: every output and gradient is over 32 MB and newly "
            "allocated.",
            ("sasrec_n50_b8192", "sasrec_n100_b2048"),
        ),
        Reason(
            "A fifth to a quarter of the forward is the projection before the attention: matmuls with 64 columns. The "
            "backward computes the projection and the attention again, a sixth of a training step.",
            ("n512", "n1024", "n2048"),
        ),
        Reason(
            "The matrices have 50 to 200 rows. Half the kernel's time is matmuls with partial tiles, at half the rate "
            "of a large matmul. The other half is masking, softmax and transposes, which do not overlap with them."
        ),
    ),
    ("wasserstein_attention", "cpu"): (
        Reason(
            "Head dims of 16 and matrices of 50 to 200 rows make short matmuls with partial tiles. Deviations, squared "
            "weights, masking, softmax and transposes do not overlap with them."
        ),
    ),
    ("lrea_absorbed_attention", "cpu"): (
        Reason("One user's work takes 0.008 ms; the overhead of any call is 0.03 ms.", ("1x100_r32",)),
        Reason(
            "Half the time the operating system maps the output's 64 MB of newly allocated pages.", ("1024x256_r32",)
        ),
        Reason(
            "States are read from random rows of a table larger than the cache, and the keys are transposed before "
            "they are multiplied."
        ),
    ),
    ("lrea_compress", "cpu"): (
        Reason(
            "The matmuls have 32 rows and reach a third of the rate of a large one. The backward's gradient of the "
            "behaviours, padding included, is newly allocated memory, whose pages the operating system maps."
        ),
    ),
    ("lrea_compress_items", "cpu"): (
        Reason("The matmuls have 32 rows, and a third of the time gathers their inputs event by event."),
    ),
    ("sink_attention", "cuda"): (NOT_PROFILED,),
    ("refined_attention", "cuda"): (NOT_PROFILED,),
    ("lrea_absorbed_attention", "cuda"): (NOT_PROFILED,),
    ("lrea_attention", "cpu"): (
        Reason(
            "A user has few targets: register tiles are partial, and packing w_decomp and the leaky ReLU between the "
            "matmuls do not overlap with them."
        ),
    ),
}


def reason(operator: str, workload: str, type: str) -> str:
    """Why the measured time differs from the prediction. Raises LookupError if nobody has written a reason yet."""
    for known in REASONS.get((operator, type), ()):
        if workload in (known.workloads or (workload,)):
            return known.why
    raise LookupError(f"{operator}, {workload}: the measured time differs from the prediction; say why in {__name__}")

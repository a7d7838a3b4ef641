"""Why a measured time differs from the prediction of `benchmarks.report.cost_model`, as profiles showed it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    why: str
    workloads: tuple[str, ...] = ()  # none: all workloads of the operator


# By operator and type of device. The first reason that fits a workload applies.
REASONS: dict[tuple[str, str], tuple[Reason, ...]] = {
    ("sink_attention", "cpu"): (
        Reason(
            "Sequences of similar length form a batch, padded by up to an eighth. That makes a dozen batches, each of "
            "about fifty small PyTorch calls.",
            ("movielens", "one_long"),
        ),
        Reason(
            "Most tokens are sinks, so the correction dominates. It is a chain of PyTorch calls, and each moves every "
            "pair of sinks through memory (from 32 MB on, through newly mapped pages).",
            ("m410", "m1024"),
        ),
        Reason(
            "PyTorch's flash attention multiplies in blocks of 32 or 64 queries. They reach half to two thirds of the "
            "rate of a large matmul, and less for fewer than 512 keys."
        ),
    ),
    ("bert_layer", "cpu"): (
        Reason(
            "Three quarters of the time is matmuls with 768 and 3072 columns. They are slower than the square matmul "
            "that sets the ceiling."
        ),
    ),
    ("inter_sink_bias", "cpu"): (
        Reason("A CPU runs the reference: PyTorch calls that copy and mask the scores of every head."),
    ),
    ("refined_attention", "cpu"): (
        Reason(
            "The Wasserstein refinement has no CPU kernel. Each slice of the batch takes about forty PyTorch calls "
            "over its N × N scores.",
            ("sasrec_stochastic_logits", "sasrec_stochastic_weights"),
        ),
        Reason(
            "Half the time the operating system maps pages: every output and gradient is over 32 MB and newly "
            "allocated.",
            ("sasrec_n50_b8192", "sasrec_n100_b2048"),
        ),
        Reason(
            "Each slice of the batch is processed in blocks of rows by PyTorch calls: small matmuls, copies into their "
            "inputs, and the overhead of the calls.",
            ("n512", "n1024", "n2048"),
        ),
        Reason(
            "The matrices have 50 to 200 rows. Half the kernel's time is matmuls with partial tiles, at half the rate "
            "of a large matmul. The other half is masking, softmax and transposes, which do not overlap with them."
        ),
    ),
    ("wasserstein_attention", "cpu"): (
        Reason(
            "There is no CPU kernel. Each slice of the batch takes about thirty PyTorch calls over its N × N scores."
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
            "The backward multiplies padded histories, seven times as long as their events, with PyTorch calls. The "
            "forward's matmuls have 32 rows and reach a third of the rate of a large one."
        ),
    ),
    ("lrea_compress_items", "cpu"): (
        Reason("The matmuls have 32 rows, and a third of the time gathers their inputs event by event."),
    ),
    ("lrea_attention", "cpu"): (
        Reason(
            "PyTorch's bmm multiplies a user's few targets with the user's state, far below the rate of a large "
            "matmul. On a small batch the dozens of calls that prepare it dominate."
        ),
    ),
}


def reason(operator: str, workload: str, type: str) -> str:
    """Why the measured time differs from the prediction. Raises LookupError if nobody has written a reason yet."""
    for known in REASONS.get((operator, type), ()):
        if workload in (known.workloads or (workload,)):
            return known.why
    raise LookupError(f"{operator}, {workload}: the measured time differs from the prediction; say why in {__name__}")

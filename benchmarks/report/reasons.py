"""Why what was measured parts from `benchmarks.report.cost_model`, as profiles showed it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    why: str
    workloads: tuple[str, ...] = ()  # none: all of the operator's


# By operator and type of device; the first that fits a workload is given.
REASONS: dict[tuple[str, str], tuple[Reason, ...]] = {
    ("sink_attention", "cpu"): (
        Reason(
            "Sequences of similar lengths are a batch of their own, padded by up to an eighth: a dozen batches, and "
            "as many times some fifty small calls of PyTorch.",
            ("movielens", "one_long"),
        ),
        Reason(
            "Where most tokens are sinks the correction is the larger part: calls of PyTorch, each of which moves "
            "every pair of sinks to memory and back (from 32 MB on into fresh pages).",
            ("m410", "m1024"),
        ),
        Reason(
            "PyTorch's flash attention takes its products in blocks of 32 or 64 queries, which reach half to two "
            "thirds of the rate of a large product, and less of fewer than 512 keys."
        ),
    ),
    ("bert_layer", "cpu"): (
        Reason(
            "Products of 768 and 3072 columns, three quarters of the time, are slower than the square one that is the "
            "ceiling."
        ),
    ),
    ("inter_sink_bias", "cpu"): (
        Reason(
            "It is the reference on a CPU: calls of PyTorch over the scores of every head, which copy and mask them."
        ),
    ),
    ("refined_attention", "cpu"): (
        Reason(
            "The Wasserstein refinement has no kernel on a CPU: it is some forty calls of PyTorch for each slice of "
            "the batch, over its N × N scores.",
            ("sasrec_stochastic_logits", "sasrec_stochastic_weights"),
        ),
        Reason(
            "Half of the time the system maps the pages of outputs and gradients, each of which is over 32 MB and "
            "allocated anew.",
            ("sasrec_n50_b8192", "sasrec_n100_b2048"),
        ),
        Reason(
            "Slices of the batch in blocks of rows, by PyTorch's calls: small products, copies into them, and the "
            "calls.",
            ("n512", "n1024", "n2048"),
        ),
        Reason(
            "Matrices of 50 to 200 rows: products with edges, at half the rate of a large one, are half of the "
            "kernel's time; masks and softmax, which nothing overlaps, and transposing are the other."
        ),
    ),
    ("wasserstein_attention", "cpu"): (
        Reason(
            "It has no kernel on a CPU: it is some thirty calls of PyTorch for each slice of the batch, over its N × "
            "N scores."
        ),
    ),
    ("lrea_absorbed_attention", "cpu"): (
        Reason("One user's 0.008 ms of work under the 0.03 ms of any call.", ("1x100_r32",)),
        Reason("Half of the time the system maps the output's 64 MB of pages, allocated anew.", ("1024x256_r32",)),
        Reason(
            "States are read from random rows of a table larger than the cache, and keys transposed, before they are "
            "multiplied."
        ),
    ),
    ("lrea_compress", "cpu"): (
        Reason(
            "The backward multiplies padded histories, seven times their events, by PyTorch's calls; the forward's "
            "products of 32 rows reach a third of the rate of a large one."
        ),
    ),
    ("lrea_compress_items", "cpu"): (
        Reason("Products of 32 rows, and a third of the time gathering what they multiply event by event."),
    ),
    ("lrea_attention", "cpu"): (
        Reason(
            "Products of a user's few targets with their state, by PyTorch's bmm, far below the rate of a large one; "
            "of a small batch, the dozens of calls that describe it."
        ),
    ),
}


def reason(operator: str, workload: str, type: str) -> str:
    """LookupError where nobody has written one yet."""
    for known in REASONS.get((operator, type), ()):
        if workload in (known.workloads or (workload,)):
            return known.why
    raise LookupError(
        f"{operator}, {workload}: measured and predicted part, and benchmarks.report.reasons does not say why"
    )

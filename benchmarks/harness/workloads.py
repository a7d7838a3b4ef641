"""The named workloads, and the generator of their inputs.

The structure of a workload (lengths, positions, offsets) is the same in every set of inputs; the values differ.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import Tensor

from benchmarks.data.movielens import ITEMS, Histories

TIERS = ("quick", "default", "full")


@dataclass(frozen=True, kw_only=True)
class Workload:
    name: str
    batch: int  # sequences or users
    tier: str = "default"
    gate_batch: int | None = None  # smaller batch for the correctness gate, if float64 on the whole is too slow
    histories: bool = False  # lengths and items from real histories
    devices: tuple[str, ...] = ("cpu", "cuda")  # runs on these by default; elsewhere only if named

    @property
    def shape(self) -> dict[str, object]:
        """The fields that define the problem, by name."""
        own = {f.name for f in fields(self)} - {"name", "tier", "gate_batch", "histories", "devices"}
        return {name: value for name, value in asdict(self).items() if name in own}

    @property
    def gate(self) -> "Workload":
        return replace(
            self, batch=self.gate_batch or self.batch, **({"dropout_p": 0.0} if "dropout_p" in self.shape else {})
        )


@dataclass(frozen=True, kw_only=True)
class SinkWorkload(Workload):
    """Sequences of `length` tokens, or packed sequences of different lengths.

    `histories`: packed; every behaviour is `tokens_per_behavior` tokens, and the last of these is its sink.
    `ragged`: packed; 1 to `length` tokens with probability ∝ 1/n of n tokens, with the same share of sinks.
    `others`: packed; one sequence of `length` tokens, and the others of that many.
    """

    heads: int
    kv_heads: int
    length: int
    dim: int
    sinks: int
    causal: bool = False
    ragged: bool = False
    others: int | None = None
    tokens_per_behavior: int | None = None
    dropout_p: float = 0.0  # of attention weights. Checked without it: nobody can compare two masks

    @property
    def packed(self) -> bool:
        return self.histories or self.ragged or self.others is not None


@dataclass(frozen=True, kw_only=True)
class RefinedWorkload(Workload):
    """Causal, as in SASRec. With `histories` padded on the left, otherwise every sequence has the full length.

    For attention between Gaussians `mechanism` is "plain", or "stochastic" if it is refined.
    """

    length: int
    dim: int
    rank: int | None = None  # of W_q and W_k; `length` by default
    heads: int = 1
    mechanism: str = "simple"
    source: str = "logits"


@dataclass(frozen=True, kw_only=True)
class LreaWorkload(Workload):
    """`targets` per user; `ragged`: 1 to `targets`, with probability ∝ 1/n of n targets.

    Histories are real (cut to their `longest` newest behaviours), or all have the same `length`.
    """

    rank: int
    dim: int
    targets: int = 1
    ragged: bool = False
    longest: int | None = None
    length: int | None = None


CPU, CUDA = ("cpu",), ("cuda",)
BOTH = CPU + CUDA


def sink_workload(name: str, batch: int, heads: int, length: int, sinks: int, **options) -> SinkWorkload:
    """`batch` sequences of `length` tokens, `sinks` of them sinks. D = 64 and kv_heads = heads by default."""
    shape = {"batch": batch, "heads": heads, "kv_heads": heads, "length": length, "dim": 64, "sinks": sinks}
    return SinkWorkload(name=name, **{**shape, **options})


def gpu_sink_workload(name: str, tokens: int, length: int, dim: int, sinks: int, **options) -> SinkWorkload:
    """`tokens` in sequences of `length`, with as many heads as make 1024 columns."""
    shape = {"batch": tokens // length, "heads": 1024 // dim, "length": length, "sinks": sinks, "dim": dim}
    return sink_workload(name, devices=CUDA, **{**shape, **options})


def sink_sweep(
    prefix: str, tokens: int, lengths: Sequence[int], devices: tuple[str, ...], gate_batch: int = 1
) -> tuple[SinkWorkload, ...]:
    """From many short sequences to one long one at the same number of tokens, full and causal, 10% of them sinks."""
    options = {"gate_batch": gate_batch, "tier": "full", "devices": devices}
    return tuple(
        sink_workload(f"{prefix}{n}{suffix}", tokens // n, 8, n, n // 10, causal=causal, **options)
        for n in lengths
        for causal, suffix in ((False, ""), (True, "_causal"))
    )


def gpu_refined_workload(name: str, batch_heads: int, length: int, **options) -> RefinedWorkload:
    """`batch_heads` pairs of a sequence and one of its two heads."""
    shape = {"batch": batch_heads // 2, "heads": 2, "length": length, "dim": 64, "gate_batch": 16}
    return RefinedWorkload(name=name, devices=CUDA, **shape, **options)


SINK = (
    sink_workload("tiny", 2, 4, 64, 7, kv_heads=2, dim=16, tier="quick"),
    sink_workload("headline", 4, 8, 1024, 100, gate_batch=1, devices=CPU),
    # CTR-Sink's encoder (RoBERTa, 4 layers of 8 heads) and its decoder (Qwen2-0.5B: 14 heads on 2).
    sink_workload("dropout", 4, 8, 512, 49, dropout_p=0.1, gate_batch=1, tier="full", devices=CPU),
    sink_workload("ctr_sink", 8, 8, 512, 49, gate_batch=2, devices=CPU),
    sink_workload("ctr_sink_decoder", 4, 14, 512, 49, kv_heads=2, causal=True, gate_batch=1),
    sink_workload("movielens", 16, 4, 512, 128, tokens_per_behavior=4, histories=True, gate_batch=4),
    # For a GPU: every length with both head dims, full and causal alternating, 5 to 20% of the tokens sinks. The gate
    # checks the whole workload wherever float64 fits, because some peers compile for a shape.
    gpu_sink_workload("gpu_1k_d64", 32768, 1024, 64, 102),
    gpu_sink_workload("gpu_1k_d128_causal", 32768, 1024, 128, 205, causal=True),
    gpu_sink_workload("gpu_2k_d64_causal", 32768, 2048, 64, 205, causal=True),
    gpu_sink_workload("gpu_2k_d128", 32768, 2048, 128, 102),
    gpu_sink_workload("gpu_4k_d64", 16384, 4096, 64, 819),
    gpu_sink_workload("gpu_4k_d128_causal", 16384, 4096, 128, 410, causal=True),
    gpu_sink_workload("gpu_8k_d64_causal", 16384, 8192, 64, 410, causal=True, gate_batch=1),
    gpu_sink_workload("gpu_8k_d128", 16384, 8192, 128, 819),
    gpu_sink_workload("gpu_ctr_sink", 32768, 512, 64, 49, heads=8),
    gpu_sink_workload("gpu_zipf", 2048, 2048, 64, 205, batch=64, ragged=True),
    gpu_sink_workload("gpu_zipf_causal", 2048, 2048, 64, 205, batch=64, ragged=True, causal=True),
    gpu_sink_workload("gpu_many_short", 64, 64, 64, 6, batch=2048, ragged=True, causal=True, gate_batch=64),
    gpu_sink_workload("gpu_memory", 65536, 8192, 64, 800, gate_batch=1),
    sink_workload("b32_n64", 32, 4, 64, 8, gate_batch=4, tier="full", devices=CPU),
    sink_workload("b32_n128", 32, 4, 128, 12, gate_batch=4, tier="full", devices=CPU),
    *sink_sweep("n", 4096, (128, 256, 512, 1024, 2048, 4096), CPU),
    *sink_sweep("gpu_n", 32768, (128, 512, 2048, 8192, 16384), CUDA),
    # From no sinks to nothing but sinks.
    *(
        sink_workload(f"m{sinks}", 2, 8, 1024, sinks, gate_batch=1, tier="full")
        for sinks in (0, 51, 102, 205, 410, 1024)
    ),
    # The heads of BERT-base and Qwen2-7B at CTR-Sink's length; on a GPU larger batches, and Qwen2-0.5B too.
    *(
        sink_workload(name, batch, heads, 512, 49, **shape, gate_batch=1, tier="full", devices=devices)
        for name, batch, heads, shape, devices in (
            ("bert_base", 8, 12, {}, CPU),
            ("qwen2_7b", 2, 28, {"kv_heads": 4, "dim": 128, "causal": True}, CPU),
            ("gpu_bert_base", 64, 12, {}, CUDA),
            ("gpu_qwen2_0.5b", 64, 14, {"kv_heads": 2, "causal": True}, CUDA),
            ("gpu_qwen2_7b", 64, 28, {"kv_heads": 4, "dim": 128, "causal": True}, CUDA),
        )
    ),
    # N % 128 == 64, and one long sequence among short ones.
    *sink_sweep("n", 8 * 576, (576,), BOTH, gate_batch=2),
    sink_workload("one_long", 64, 8, 4096, 410, others=32, causal=True, gate_batch=2, tier="full"),
)

INTER_SINK_BIAS = (
    sink_workload("tiny", 2, 4, 64, 7, dim=16, tier="quick"),
    sink_workload("ctr_sink_bias", 64, 8, 512, 49),
    sink_workload("small", 8, 4, 128, 12, dim=32, tier="full", devices=CPU),
    gpu_sink_workload("gpu_ctr_sink_bias", 2**18, 512, 64, 49, heads=8),
)

BERT_LAYER = (
    sink_workload("tiny", 2, 4, 64, 7, dim=16, tier="quick"),
    sink_workload("bert_base", 8, 12, 512, 49, dropout_p=0.1, gate_batch=1, tier="full"),
)

REFINED = (
    RefinedWorkload(name="tiny", batch=4, length=20, dim=16, heads=2, histories=True, tier="quick"),
    RefinedWorkload(name="sasrec", batch=256, length=50, dim=50, histories=True),
    RefinedWorkload(name="sasrec_200", batch=128, length=200, dim=50, histories=True, gate_batch=32),
    # For a GPU: the lengths of sequential recommenders, and longer ones, where W has a low rank as the paper's claim
    # of linear cost requires.
    gpu_refined_workload("gpu_50", 8192, 50),
    gpu_refined_workload("gpu_100", 4096, 100),
    gpu_refined_workload("gpu_200", 1024, 200),
    gpu_refined_workload("gpu_50_value", 8192, 50, mechanism="value"),
    gpu_refined_workload("gpu_512", 512, 512, rank=64),
    gpu_refined_workload("gpu_2048", 64, 2048, rank=64),
    *(
        RefinedWorkload(
            name=f"sasrec_{mechanism}_{source}",
            batch=256,
            length=50,
            dim=50,
            mechanism=mechanism,
            source=source,
            histories=True,
            tier="full",
        )
        for mechanism in ("simple", "value", "additive", "stochastic")
        for source in ("logits", "weights")
        if (mechanism, source) != ("simple", "logits")
    ),
    # SASRec's and STOSA's lengths and batches.
    *(
        RefinedWorkload(
            name=f"sasrec_n{length}_b{batch}",
            batch=batch,
            length=length,
            dim=50,
            histories=True,
            gate_batch=64,
            tier="full",
            devices=devices,
        )
        for length, batch, devices in (
            (50, 2048, BOTH),
            (50, 8192, BOTH),
            (100, 256, BOTH),
            (100, 2048, BOTH),
            (100, 8192, CUDA),
            (200, 256, BOTH),
            (200, 2048, CUDA),
            (200, 8192, CUDA),
        )
    ),
    *(
        RefinedWorkload(name=f"n{length}", batch=4, heads=2, length=length, dim=64, rank=64, gate_batch=1, tier="full")
        for length in (512, 1024, 2048)
    ),
)

WASSERSTEIN = (
    RefinedWorkload(name="tiny", batch=4, length=20, dim=16, heads=2, mechanism="plain", histories=True, tier="quick"),
    *(
        RefinedWorkload(
            name=name,
            batch=batch,
            length=length,
            dim=16,
            heads=4,
            mechanism=mechanism,
            histories=True,
            gate_batch=32,
            tier=tier,
            devices=devices,
        )
        for name, batch, length, mechanism, tier, devices in (
            ("stosa", 128, 100, "plain", "default", BOTH),
            ("stosa_refined", 64, 100, "stochastic", "full", BOTH),
            ("stosa_50", 256, 50, "plain", "full", BOTH),
            ("stosa_200", 64, 200, "plain", "full", BOTH),
            ("gpu_stosa", 2048, 100, "plain", "default", CUDA),
            ("gpu_stosa_refined", 2048, 100, "stochastic", "default", CUDA),
        )
    ),
)

LREA_ABSORBED = (
    LreaWorkload(name="tiny", batch=4, targets=8, rank=8, dim=16, tier="quick"),
    LreaWorkload(name="256x100", batch=256, targets=100, rank=32, dim=64),
    LreaWorkload(name="zipf", batch=256, targets=500, rank=32, dim=64, ragged=True),
    *(
        LreaWorkload(name=f"{users}x{targets}_r{rank}", batch=users, targets=targets, rank=rank, dim=64, tier="full")
        for users, targets, rank in ((1, 100, 32), (64, 500, 16), (1024, 256, 32))
    ),
    LreaWorkload(name="gpu_1x1000", batch=1, targets=1000, rank=32, dim=64, length=10_000, devices=CUDA),
    LreaWorkload(
        name="gpu_1000x200", batch=1000, targets=200, rank=32, dim=64, length=10_000, gate_batch=32, devices=CUDA
    ),
)

LREA_COMPRESS = (
    LreaWorkload(name="tiny", batch=4, rank=8, dim=16, longest=30, histories=True, tier="quick"),
    LreaWorkload(name="movielens", batch=256, rank=32, dim=64, histories=True),
    LreaWorkload(name="movielens_all", batch=943, rank=32, dim=64, histories=True, gate_batch=256, tier="full"),
    LreaWorkload(name="gpu_10k", batch=256, rank=32, dim=64, length=10_000, gate_batch=32, devices=CUDA),
)

LREA_RESTORED = (
    LreaWorkload(name="tiny", batch=4, targets=3, rank=8, dim=16, longest=30, histories=True, tier="quick"),
    LreaWorkload(name="movielens", batch=256, targets=4, rank=32, dim=64, histories=True),
    LreaWorkload(
        name="movielens_all", batch=943, targets=4, rank=32, dim=64, histories=True, gate_batch=256, tier="full"
    ),
    LreaWorkload(name="gpu_16k", batch=256, targets=64, rank=32, dim=64, length=10_000, gate_batch=16, devices=CUDA),
)


class Draw:
    """Draws one set of inputs. Everything drawn from `structure` is the same for every seed."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device, histories: Histories) -> None:
        self.values = torch.Generator(device).manual_seed(seed)
        self.structure = torch.Generator().manual_seed(0)
        self.dtype, self.device, self.histories = dtype, device, histories

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=self.values, device=self.device)).to(self.dtype)

    def zipf(self, count: int, largest: int) -> Tensor:
        """[count] integers from 1 to `largest`; n has probability ∝ 1/n."""
        sizes = torch.arange(1, largest + 1)
        return sizes[torch.multinomial(1 / sizes, count, replacement=True, generator=self.structure)]

    def index(self, values: Tensor | Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).to(self.device)

    def embeddings(self, histories: Sequence[Tensor], dim: int, padding_side: str = "right") -> Tensor:
        """[U, L, dim] standard normal embeddings, one per behaviour, looked up by item; zeros at padding."""
        table = torch.randn(ITEMS + 1, dim, generator=self.values, device=self.device).to(self.dtype)
        table[0] = 0
        ids = torch.nn.utils.rnn.pad_sequence(histories, batch_first=True, padding_side=padding_side)  # [U, L]
        return table[ids.to(self.device)]


def offsets(lengths: Sequence[int] | Tensor) -> Tensor:
    """[n + 1] start of each packed sequence, and the total length."""
    lengths = torch.as_tensor(lengths)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

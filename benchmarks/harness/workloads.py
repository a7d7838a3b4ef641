"""The named workloads, and the generator of their inputs.

The structure of a workload (lengths, positions, offsets) is the same in every set of inputs; the values are fresh.
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
    gate_batch: int | None = None  # the correctness gate's batch, where float64 on the whole would be too slow
    histories: bool = False  # lengths and items of real histories
    devices: tuple[str, ...] = ("cpu", "cuda")  # run on these; elsewhere only if named

    @property
    def shape(self) -> dict[str, object]:
        """What defines the problem, by name."""
        own = {f.name for f in fields(self)} - {"name", "tier", "gate_batch", "histories", "devices"}
        return {name: value for name, value in asdict(self).items() if name in own}

    @property
    def gate(self) -> "Workload":
        return replace(self, batch=self.gate_batch or self.batch)


@dataclass(frozen=True, kw_only=True)
class SinkWorkload(Workload):
    """With `histories` packed sequences: every behaviour is `tokens_per_behavior` tokens, the last of them its sink.

    `ragged`: packed sequences of 1 to `length` tokens, n of them with probability ∝ 1/n, the same share of them sinks.
    `others`: packed too, one sequence of `length` tokens and the others of that many.
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

    @property
    def packed(self) -> bool:
        return self.histories or self.ragged or self.others is not None


@dataclass(frozen=True, kw_only=True)
class RefinedWorkload(Workload):
    """Causal, as in SASRec; with `histories` left-padded, else every sequence is of full length.

    Of attention between Gaussians, `mechanism` is "plain", or "stochastic" where it is refined.
    """

    length: int
    dim: int
    rank: int | None = None  # of W_q and W_k; `length` by default
    heads: int = 1
    mechanism: str = "simple"
    source: str = "logits"


@dataclass(frozen=True, kw_only=True)
class LreaWorkload(Workload):
    """`targets` per user; `ragged`: 1 to `targets`, n of them with probability ∝ 1/n.

    Histories are real, up to their `longest` newest behaviours, or all of the same `length`.
    """

    rank: int
    dim: int
    targets: int = 1
    ragged: bool = False
    longest: int | None = None
    length: int | None = None


def sink_workload(name: str, tokens: int, length: int, dim: int, sinks: int, **options) -> SinkWorkload:
    """`tokens` in sequences of `length`, as many heads as make 1024 columns."""
    heads = 1024 // dim
    shape = {"batch": tokens // length, "heads": heads, "kv_heads": heads, "length": length, "dim": dim, "sinks": sinks}
    return SinkWorkload(name=name, devices=("cuda",), **{**shape, **options})


def sweep(
    prefix: str, tokens: int, lengths: Sequence[int], devices: tuple[str, ...], gate_batch: int = 1
) -> tuple[SinkWorkload, ...]:
    """From many short sequences to one long one, of as many tokens, full and causal, a tenth of the tokens sinks."""
    return tuple(
        SinkWorkload(
            name=f"{prefix}{length}{'_causal' if causal else ''}",
            batch=tokens // length,
            heads=8,
            kv_heads=8,
            length=length,
            dim=64,
            sinks=length // 10,
            causal=causal,
            gate_batch=gate_batch,
            tier="full",
            devices=devices,
        )
        for length in lengths
        for causal in (False, True)
    )


def refined_workload(name: str, pairs: int, length: int, **options) -> RefinedWorkload:
    """`pairs` of a sequence and one of its two heads."""
    return RefinedWorkload(
        name=name, batch=pairs // 2, heads=2, length=length, dim=64, gate_batch=16, devices=("cuda",), **options
    )


CPU, CUDA = ("cpu",), ("cuda",)
BOTH = CPU + CUDA

SINK = (
    SinkWorkload(name="tiny", batch=2, heads=4, kv_heads=2, length=64, dim=16, sinks=7, tier="quick"),
    SinkWorkload(
        name="headline", batch=4, heads=8, kv_heads=8, length=1024, dim=64, sinks=100, gate_batch=1, devices=CPU
    ),
    # CTR-Sink's encoder (RoBERTa, 4 layers of 8 heads) and its decoder (Qwen2-0.5B: 14 heads on 2).
    SinkWorkload(
        name="ctr_sink", batch=8, heads=8, kv_heads=8, length=512, dim=64, sinks=49, gate_batch=2, devices=CPU
    ),
    SinkWorkload(
        name="ctr_sink_decoder", batch=4, heads=14, kv_heads=2, length=512, dim=64, sinks=49, causal=True, gate_batch=1
    ),
    SinkWorkload(
        name="movielens",
        batch=16,
        heads=4,
        kv_heads=4,
        length=512,
        dim=64,
        sinks=128,
        tokens_per_behavior=4,
        histories=True,
        gate_batch=4,
    ),
    # For a GPU: every length with both head dims, full and causal alternating, 5 to 20% of the tokens sinks. Where
    # float64 of the whole fits, the gate sees what is timed: peers compile for a shape.
    sink_workload("gpu_1k_d64", 32768, 1024, 64, 102),
    sink_workload("gpu_1k_d128_causal", 32768, 1024, 128, 205, causal=True),
    sink_workload("gpu_2k_d64_causal", 32768, 2048, 64, 205, causal=True),
    sink_workload("gpu_2k_d128", 32768, 2048, 128, 102),
    sink_workload("gpu_4k_d64", 16384, 4096, 64, 819),
    sink_workload("gpu_4k_d128_causal", 16384, 4096, 128, 410, causal=True),
    sink_workload("gpu_8k_d64_causal", 16384, 8192, 64, 410, causal=True, gate_batch=1),
    sink_workload("gpu_8k_d128", 16384, 8192, 128, 819),
    sink_workload("gpu_ctr_sink", 32768, 512, 64, 49, heads=8, kv_heads=8),
    sink_workload("gpu_zipf", 2048, 2048, 64, 205, batch=64, ragged=True),
    sink_workload("gpu_zipf_causal", 2048, 2048, 64, 205, batch=64, ragged=True, causal=True),
    sink_workload("gpu_many_short", 64, 64, 64, 6, batch=2048, ragged=True, causal=True, gate_batch=64),
    sink_workload("gpu_memory", 65536, 8192, 64, 800, gate_batch=1),
    *sweep("n", 4096, (128, 256, 512, 1024, 2048, 4096), CPU),
    *sweep("gpu_n", 32768, (128, 512, 2048, 8192, 16384), CUDA),
    # From no sinks to nothing else.
    *(
        SinkWorkload(
            name=f"m{sinks}", batch=2, heads=8, kv_heads=8, length=1024, dim=64, sinks=sinks, gate_batch=1, tier="full"
        )
        for sinks in (0, 51, 102, 205, 410, 1024)
    ),
    # BERT-base's and Qwen2-7B's heads at CTR-Sink's length; on a GPU with more of it, and Qwen2-0.5B's too.
    *(
        SinkWorkload(
            name=name,
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            dim=dim,
            length=512,
            sinks=49,
            causal=causal,
            gate_batch=1,
            tier="full",
            devices=devices,
        )
        for name, batch, heads, kv_heads, dim, causal, devices in (
            ("bert_base", 8, 12, 12, 64, False, CPU),
            ("qwen2_7b", 2, 28, 4, 128, True, CPU),
            ("gpu_bert_base", 64, 12, 12, 64, False, CUDA),
            ("gpu_qwen2_0.5b", 64, 14, 2, 64, True, CUDA),
            ("gpu_qwen2_7b", 64, 28, 4, 128, True, CUDA),
        )
    ),
    # N % 128 == 64, and one long sequence among short ones.
    *sweep("n", 8 * 576, (576,), BOTH, gate_batch=2),
    SinkWorkload(
        name="one_long",
        batch=64,
        heads=8,
        kv_heads=8,
        length=4096,
        others=32,
        dim=64,
        sinks=410,
        causal=True,
        gate_batch=2,
        tier="full",
    ),
)

INTER_SINK_BIAS = (
    SinkWorkload(name="tiny", batch=2, heads=4, kv_heads=4, length=64, dim=16, sinks=7, tier="quick"),
    SinkWorkload(name="ctr_sink_bias", batch=64, heads=8, kv_heads=8, length=512, dim=64, sinks=49),
    sink_workload("gpu_ctr_sink_bias", 2**18, 512, 64, 49, heads=8, kv_heads=8),
)

BERT_LAYER = (
    SinkWorkload(name="tiny", batch=2, heads=4, kv_heads=4, length=64, dim=16, sinks=7, tier="quick"),
    SinkWorkload(
        name="bert_base", batch=8, heads=12, kv_heads=12, length=512, dim=64, sinks=49, gate_batch=1, tier="full"
    ),
)

REFINED = (
    RefinedWorkload(name="tiny", batch=4, length=20, dim=16, heads=2, histories=True, tier="quick"),
    RefinedWorkload(name="sasrec", batch=256, length=50, dim=50, histories=True),
    RefinedWorkload(name="sasrec_200", batch=128, length=200, dim=50, histories=True, gate_batch=32),
    # For a GPU: where sequential recommenders live, and beyond, where W has a rank for the paper's claim to hold.
    refined_workload("gpu_50", 8192, 50),
    refined_workload("gpu_100", 4096, 100),
    refined_workload("gpu_200", 1024, 200),
    refined_workload("gpu_50_value", 8192, 50, mechanism="value"),
    refined_workload("gpu_512", 512, 512, rank=64),
    refined_workload("gpu_2048", 64, 2048, rank=64),
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
    """Draws one set of inputs. What depends on `structure` is the same for every seed."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device, histories: Histories) -> None:
        self.values = torch.Generator(device).manual_seed(seed)
        self.structure = torch.Generator().manual_seed(0)
        self.dtype, self.device, self.histories = dtype, device, histories

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=self.values, device=self.device)).to(self.dtype)

    def zipf(self, count: int, largest: int) -> Tensor:
        """[count] of 1 to `largest`, n with probability ∝ 1/n."""
        sizes = torch.arange(1, largest + 1)
        return sizes[torch.multinomial(1 / sizes, count, replacement=True, generator=self.structure)]

    def index(self, values: Tensor | Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).to(self.device)

    def embeddings(self, histories: Sequence[Tensor], dim: int, padding_side: str = "right") -> Tensor:
        """[U, L, dim]: standard normal embeddings of the items, one a behaviour; zeros at padding."""
        table = torch.randn(ITEMS + 1, dim, generator=self.values, device=self.device).to(self.dtype)
        table[0] = 0
        ids = torch.nn.utils.rnn.pad_sequence(histories, batch_first=True, padding_side=padding_side)  # [U, L]
        return table[ids.to(self.device)]


def offsets(lengths: Sequence[int] | Tensor) -> Tensor:
    """[n + 1] where each of the packed pieces starts, and the total."""
    lengths = torch.as_tensor(lengths)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

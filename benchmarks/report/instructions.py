"""How long a compiled kernel takes, from its instruction counts.

`benchmarks.tools.counts` takes the counts from the compile table: for every kernel configuration and architecture, what
one warp asks of a processor's units in the whole kernel (W) and in its main loop (L). The blocks of a launch run each
instruction once, and the main loop as often as the launch has tiles to multiply:

    executed = warps · (blocks · W + (rounds - blocks · h) · L)       h = FLOPs of W / FLOPs of L
    t        = t_launch + max(unevenness · (t_mma + max_u t_u), bytes / copy rate)
    t_mma    = executed FLOPs / matmul rate
    t_u      = executed_u · clocks_u / (4 · processors · clock rate)

h counts the rounds that the code holds: the loops with and without masks, and what is before them. Where the warps of a
block repeat each other's products, as in tiles of few rows, the executed FLOPs are more than the equation's. On Hopper
mma.sync reaches 62% of the matmul rate, and each wgmma that ptxas serialized is taken to wait for 32 clocks. clocks_u
are those of a quarter of a processor for an instruction of a warp: 1 to issue any, 8 for special functions, 2 for
integers and comparisons, 1 for FP32 (2 on Ampere), 4 for 128 bytes of shared memory. Tensor cores and the rest do not
overlap: that is what the fastest published attentions reach. Unevenness is the most blocks of a processor over the
average. Latency, bank conflicts and the second-level cache are left out.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from benchmarks.report.devices import Device

COUNTS = Path(__file__).parents[1] / "data" / "instruction_counts.json"

# Clocks of a quarter of a processor for one instruction of a warp, by unit.
CLOCKS = {"instructions": 1, "mufu": 8, "fma": 1, "alu": 2, "shared": 4}
CLOCKS_OF_AMPERE = {**CLOCKS, "fma": 2}
UNITS = {
    "instructions": "issue",
    "mufu": "special functions",
    "fma": "FP32",
    "alu": "integers",
    "shared": "shared memory",
}
MMA_SYNC_ON_HOPPER = 0.62
SERIALIZED_CLOCKS = 32
MMA, MEMORY, LAUNCHES, MUFU = "tensor cores", "memory", "launches", UNITS["mufu"]


@dataclass(frozen=True)
class Kernel:
    """A configuration of the compile table. `sizes` are those in its name, with its tile as BLOCK_M and BLOCK_N."""

    name: str
    architecture: int
    words: frozenset[str]
    sizes: Mapping[str, int]
    warps: int
    counts: Mapping[str, int]

    @classmethod
    def of(cls, name: str, counts: Mapping[str, int]) -> "Kernel":
        kernel, architecture, *label = name.split()
        sizes = {key: int(value) for key, value in (word.split("=") for word in label if "=" in word)}
        tiles = [word for word in label if re.fullmatch(r"\d+(x\d+)*", word)]
        if tiles and "x" in tiles[0]:
            sizes["BLOCK_M"], sizes["BLOCK_N"] = map(int, tiles[0].split("x")[:2])
        if "stage" in label:
            sizes["stage"] = int(label[label.index("stage") + 1])
        words = frozenset(word for word in label if "=" not in word and word not in tiles)
        return cls(kernel, int(architecture.removeprefix("sm_")), words, sizes, sizes["warps"], counts)

    @property
    def held(self) -> float:
        """Rounds of the main loop that the code holds, by their products."""
        return self.counts["flops"] / self.counts["loop_flops"] if self.counts["loop_flops"] else 1.0

    @property
    def tile(self) -> tuple[int, int]:
        return self.sizes["BLOCK_M"], self.sizes["BLOCK_N"]


@cache
def kernels(path: Path = COUNTS) -> tuple[Kernel, ...]:
    table = json.loads(path.read_text())
    return tuple(Kernel.of(name, dict(zip(table["columns"], row, strict=True))) for name, row in table["rows"].items())


def find(name: str, architecture: int, *words: str, **sizes: int) -> Kernel:
    """The configuration of a kernel with these words, with the least sizes that suffice and the fewest other words.

    Where no size suffices, the largest. Raises LookupError if there is none.
    """
    found = [k for k in kernels() if (k.name, k.architecture) == (name, architecture) and k.words.issuperset(words)]
    if not found:
        raise LookupError(f"{COUNTS.name} has no {name} sm_{architecture} {' '.join(words)}")

    def misfit(kernel: Kernel) -> tuple:
        short = [max(wanted - kernel.sizes[size], 0) for size, wanted in sizes.items()]
        return short, [kernel.sizes[size] for size in sizes], len(kernel.words)

    return min(found, key=misfit)


@dataclass(frozen=True)
class Launch:
    """`launches` launches of a kernel, with `blocks`, `bytes` and `rounds` of the main loop in all."""

    kernel: Kernel
    blocks: float
    bytes: float
    rounds: float
    launches: int = 1

    def executed(self) -> dict[str, float]:
        """By all warps. Never less than the rounds alone: the code may have loops that this launch does not enter."""
        counts, more = self.kernel.counts, self.rounds - self.blocks * self.kernel.held
        whole_and_loop = {unit: (counts[unit], counts[f"loop_{unit}"]) for unit in ("mma", "flops", *UNITS)}
        return {
            unit: self.kernel.warps * max(self.blocks * whole + more * loop, self.rounds * loop)
            for unit, (whole, loop) in whole_and_loop.items()
        }

    def milliseconds(self, device: Device, dtype: torch.dtype) -> float:
        return sum(self.parts(device, dtype).values())

    def parts(self, device: Device, dtype: torch.dtype) -> dict[str, float]:
        """Milliseconds by what takes them: the launches, and either memory or tensor cores and one more unit."""
        launching = {LAUNCHES: self.launches * device.ceilings.launch_us / 1e3}
        executed, clocks = self.executed(), CLOCKS_OF_AMPERE if device.architecture == 80 else CLOCKS
        # Clocks of all quarters of all processors in a millisecond: a processor takes 16 exponentials a clock.
        quarters = 4e6 * device.ceilings.gsoftmax / 16
        slow = device.architecture == 90 and not self.kernel.counts["loop_wgmma"]
        rate = device.ceilings.tflops[dtype] * (MMA_SYNC_ON_HOPPER if slow else 1)
        mma = executed["flops"] / rate / 1e9
        if self.kernel.counts["serialized"]:
            mma += SERIALIZED_CLOCKS * executed["mma"] / quarters
        unit, busiest = max(
            ((UNITS[unit], executed[unit] * each / quarters) for unit, each in clocks.items()), key=lambda x: x[1]
        )
        share = self.blocks / self.launches / device.processors
        uneven = math.ceil(share) / share if share else 1.0
        memory = self.bytes / device.ceilings.gbs / 1e6
        if memory > uneven * (mma + busiest):
            return {**launching, MEMORY: memory}
        return {**launching, MMA: uneven * mma, unit: uneven * busiest}

"""`python -m benchmarks.quality.faults`: training and calls under what goes wrong in practice.

1. SASRec with refined attention, CTR-Sink and LREA, small and on drawn data, are trained 2,000 steps under autocast
   with a GradScaler, gradient checkpointing and accumulated gradients, by our kernels and by the reference. The curves
   of the two must be as close as those of two seeds. The first seed's training is resumed in the middle from a
   checkpoint, loaded with weights_only=True: it must give the same losses bit for bit.
2. The same models in two processes, by DDP and FSDP2, whose shares of a batch are uneven, one of them sometimes empty,
   must end as one process does.
3. 10,000 calls of every operator, forward and backward, must leave no Python objects and no memory behind.
"""

import argparse
import gc
import io
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import recattn
from benchmarks.quality.training import mean_and_spread, new_table, train_all
from recattn.nn import LREA, InterSinkBias, RefinedSelfAttention, SinkAttention
from tests.helpers.operator_cases import CASES

ITEMS, WIDTH, HEADS, LENGTH, EVERY = 40, 16, 2, 20, 4
KERNELS, REFERENCE = "kernels", "reference"
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    steps: int = 2000
    batch: int = 8
    accumulate: int = 2
    dtype: torch.dtype = torch.bfloat16
    dropout: float = 0.1
    device: str = "cpu"


# --- The models and their data ---


class SASRec(nn.Module):
    """The next item of a sequence, by refined attention."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.items, self.positions = nn.Embedding(ITEMS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=0.2)
        self.attention = RefinedSelfAttention(WIDTH, HEADS, max_len=LENGTH, dropout=dropout, rank=8)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        padded = torch.arange(LENGTH, device=items.device) >= lengths[:, None]
        x = self.items(items) + self.positions.weight
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, key_padding_mask=padded, is_causal=True)[0]
        x = x + self.feed_forward(self.norms[1](x))
        logits = (x[:, :-1] @ self.items.weight.T).float()
        losses = F.cross_entropy(logits.flatten(0, 1), items[:, 1:].flatten(), reduction="none")
        return losses.view(len(items), LENGTH - 1).masked_fill(padded[:, 1:], 0).sum(1) / lengths  # per sequence

    @staticmethod
    def draw(batch: int, random: torch.Generator) -> Batch:
        """Each item is followed by another one in four of five cases."""
        items = torch.randint(ITEMS, (batch, LENGTH), generator=random)
        follows = torch.rand(batch, LENGTH, generator=random) < 0.8
        for i in range(1, LENGTH):
            items[:, i] = torch.where(follows[:, i], (7 * items[:, i - 1] + 3) % ITEMS, items[:, i])
        return {"items": items, "lengths": torch.randint(2, LENGTH + 1, (batch,), generator=random)}


class CTRSink(nn.Module):
    """A click, by attention with a sink after every few tokens."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, WIDTH)
        self.bias = InterSinkBias(WIDTH, HEADS)
        self.attention = SinkAttention(WIDTH, HEADS, dropout=dropout)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, items: Tensor, lengths: Tensor, clicks: Tensor) -> Tensor:
        places = torch.arange(EVERY - 1, LENGTH, EVERY, device=items.device)
        sinks = torch.where(places < lengths[:, None], places, -1)
        x = self.items(items)
        y = self.norm(x)
        x = x + self.attention(y, y, y, seq_lens=lengths, sink_positions=sinks, inter_sink_bias=self.bias(y, sinks))[0]
        valid = (torch.arange(LENGTH, device=items.device) < lengths[:, None])[..., None]
        logits = self.head((x * valid).sum(1) / lengths[:, None]).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits.float(), clicks, reduction="none")

    @staticmethod
    def draw(batch: int, random: torch.Generator) -> Batch:
        """Clicked if more than half of the tokens are of the first half of the items."""
        items = torch.randint(ITEMS, (batch, LENGTH), generator=random)
        lengths = torch.randint(1, LENGTH + 1, (batch,), generator=random)
        valid = torch.arange(LENGTH) < lengths[:, None]
        liked = ((items < ITEMS // 2) & valid).sum(1) * 2 > lengths
        return {"items": items, "lengths": lengths, "clicks": liked.float()}


class LREARanker(nn.Module):
    """Clicks on targets, by compressed target attention."""

    def __init__(self, _dropout: float) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, WIDTH)
        self.attention = LREA(WIDTH, LENGTH, 8, HEADS)
        self.head = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))

    def forward(self, items: Tensor, lengths: Tensor, targets: Tensor, clicks: Tensor) -> Tensor:
        behaviors, candidates = self.items(items), self.items(targets)
        compressed = self.attention.compress(behaviors, lengths)
        h = self.attention(candidates, behaviors, seq_lens=lengths, compressed=compressed)
        logits = self.head(torch.cat([h, candidates.to(h.dtype)], -1)).squeeze(-1)
        losses = F.binary_cross_entropy_with_logits(logits.float(), clicks, reduction="none").mean(1)
        return losses + 0.01 * F.relu(-compressed.float()).square().sum((1, 2)) / (WIDTH * 8)

    @staticmethod
    def draw(batch: int, random: torch.Generator) -> Batch:
        """Clicked if the target's class is that of more than a quarter of the history."""
        items = torch.randint(ITEMS, (batch, LENGTH), generator=random)
        lengths = torch.randint(1, LENGTH + 1, (batch,), generator=random)
        targets = torch.randint(ITEMS, (batch, 3), generator=random)
        same = (items[:, None] % 4 == targets[..., None] % 4) & (torch.arange(LENGTH) < lengths[:, None])[:, None]
        return {
            "items": items,
            "lengths": lengths,
            "targets": targets,
            "clicks": (same.sum(2) * 4 > lengths[:, None]).float(),
        }


MODELS = {"SASRec, refined": SASRec, "CTR-Sink": CTRSink, "LREA": LREARanker}


def make_model(name: str, seed: int, impl: str, dropout: float) -> nn.Module:
    torch.manual_seed(seed)
    model = MODELS[name](dropout)
    if impl == REFERENCE:
        for module in model.modules():
            if hasattr(module, "impl"):
                module.impl = "reference"
    return model


def draw_batch(name: str, seed: int, step: int, size: int) -> Batch:
    # Every seed has batches of its own.
    return MODELS[name].draw(size, torch.Generator().manual_seed(seed * 1_000_003 + step))


# --- Training ---


class Training:
    """A training that can be saved and resumed."""

    def __init__(self, name: str, seed: int, impl: str, settings: Settings) -> None:
        self.name, self.seed, self.settings, self.step = name, seed, settings, 0
        self.model = make_model(name, seed, impl, settings.dropout).to(settings.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 3e-3, fused=True)
        # Grows until gradients overflow, so that steps are skipped.
        self.scaler = torch.amp.GradScaler(settings.device, init_scale=2.0**16, growth_interval=10)
        self.skipped = 0

    def train_step(self) -> float:
        settings = self.settings
        batch = draw_batch(self.name, self.seed, self.step, settings.batch)
        losses = []
        for part in zip(*(x.to(settings.device).chunk(settings.accumulate) for x in batch.values()), strict=True):
            with torch.autocast(settings.device, settings.dtype):
                of_sequences = checkpoint(self.model, *part, use_reentrant=False)
            loss = of_sequences.sum() / settings.batch
            self.scaler.scale(loss).backward()
            losses.append(loss.item())
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped += self.scaler.get_scale() < before
        self.optimizer.zero_grad()
        self.step += 1
        return sum(losses)

    def save(self) -> bytes:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")}
        file = io.BytesIO()
        torch.save({**parts, "step": self.step, "random": torch.get_rng_state()}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        for name in ("model", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]
        torch.set_rng_state(state["random"])


class Curve(NamedTuple):
    name: str
    impl: str
    seed: int
    losses: list[float]
    skipped: int
    resumed: bool | None  # whether a training from the checkpoint gave the same losses, bit for bit; None: not tried


def train(model_and_impl: str, seed: int, settings: Settings) -> Curve:
    name, impl = model_and_impl.rsplit("/", 1)
    training, middle = Training(name, seed, impl, settings), settings.steps // 2
    losses = [training.train_step() for _ in range(middle)]
    saved = training.save()
    losses += [training.train_step() for _ in range(settings.steps - middle)]
    same = None
    if impl == KERNELS and seed == 0:
        resumed = Training(name, seed, impl, settings)
        resumed.load(saved)
        same = [resumed.train_step() for _ in range(settings.steps - middle)] == losses[middle:]
    return Curve(name, impl, seed, losses, training.skipped, same)


class Verdict(NamedTuple):
    gap: float  # the largest between kernels and reference of one seed, of means over a twentieth of the steps
    spread: float  # the largest between two seeds of the reference

    @property
    def holds(self) -> bool:
        return self.gap <= self.spread


def compare(curves: Sequence[Curve]) -> Verdict:
    def smooth(curve: Curve) -> Tensor:
        window = max(1, len(curve.losses) // 20)
        return torch.tensor(curve.losses)[: len(curve.losses) // window * window].view(-1, window).mean(1)

    smoothed: dict[tuple[str, int], Tensor] = {(c.impl, c.seed): smooth(c) for c in curves}
    seeds = sorted({c.seed for c in curves})
    gaps = [(smoothed[KERNELS, seed] - smoothed[REFERENCE, seed]).abs().max().item() for seed in seeds]
    pairs = itertools.combinations(seeds, 2)
    spreads = [(smoothed[REFERENCE, a] - smoothed[REFERENCE, b]).abs().max().item() for a, b in pairs]
    return Verdict(max(gaps), max(spreads))


def training_table(curves: Sequence[Curve]) -> tuple[Table, bool]:
    """And whether all holds."""
    columns = ("first loss", "last loss", "reference's", "largest gap", "between seeds", "steps skipped", "resumed")
    table, holds = new_table(("model",), columns), True
    for name in MODELS:
        own = [c for c in curves if c.name == name]
        ours, theirs = ([c for c in own if c.impl == impl] for impl in (KERNELS, REFERENCE))
        last = len(own[0].losses) // 20 or 1
        first, ends, references = (
            mean_and_spread([statistics.mean(c.losses[part]) for c in group])
            for group, part in ((ours, slice(last)), (ours, slice(-last, None)), (theirs, slice(-last, None)))
        )
        verdict, resumed = compare(own), all(c.resumed is not False for c in own)
        holds &= verdict.holds and resumed
        gaps = f"{verdict.gap:.4f}", f"{verdict.spread:.4f}"
        skipped = f"{min(c.skipped for c in own)}-{max(c.skipped for c in own)}"
        table.add_row(name, first, ends, references, *gaps, skipped, "bit for bit" if resumed else "NO")
    return table, holds


# --- Two processes ---

# Sequences of each process at each step.
SHARES = [(5, 3), (7, 1), (8, 0), (4, 4), (0, 8), (1, 7)]


def train_share(model: nn.Module, name: str, rank: int | None, rounds: int) -> None:
    """Steps of plain SGD on a process's share of each batch; rank None: on all of it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, shares in enumerate(SHARES * rounds):
        batch = draw_batch(name, 0, step, sum(shares))
        world = 1
        if rank is not None:
            start = sum(shares[:rank])
            batch = {key: x[start : start + shares[rank]] for key, x in batch.items()}
            world = len(shares)
        loss = model(*batch.values()).sum() * world / sum(shares)  # DDP and FSDP take the mean over processes
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def wrap(model: nn.Module, how: str) -> nn.Module:
    if how == "DDP":
        return DistributedDataParallel(model)
    return fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The parameters, gathered from the processes."""
    parameters = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in parameters.items()}


def worker(rank: int, folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name, how in itertools.product(MODELS, ("DDP", "FSDP2")):
        model = wrap(make_model(name, 0, KERNELS, 0.0), how)
        train_share(model, name, rank, rounds)
        trained = whole(model)
        if rank == 0:
            torch.save(trained, Path(folder) / f"{name}, {how}")
    dist.barrier()  # neither closes its connections while the other is at work
    dist.destroy_process_group()


def two_processes(rounds: int) -> dict[tuple[str, str], float]:
    """The largest difference of a parameter from that of one process, by model and way to distribute."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    errors = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (folder, rounds), nprocs=2)
        for name in MODELS:
            alone = make_model(name, 0, KERNELS, 0.0)
            train_share(alone, name, None, rounds)
            for how in ("DDP", "FSDP2"):
                trained = torch.load(Path(folder) / f"{name}, {how}", weights_only=True)
                differences = [(trained[key] - p).abs().max().item() for key, p in alone.named_parameters()]
                errors[name, how] = max(differences)
    return errors


# --- Leaks ---


class Growth(NamedTuple):
    objects: int  # that Python's garbage collector knows
    blocks: int  # that Python allocated
    rss_kib: int
    cuda_bytes: int


def held() -> Growth:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    cuda = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    return Growth(len(gc.get_objects()), sys.getallocatedblocks(), pages * os.sysconf("SC_PAGE_SIZE") // 1024, cuda)


def growth(call: Callable[[], object], calls: int, warm_up: int) -> Growth:
    """What `calls` calls leave behind, after as many as fill caches."""
    for _ in range(warm_up):
        call()
    gc.freeze()  # collecting is then about what the calls make
    before = held()
    for _ in range(calls):
        call()
    after = held()
    gc.unfreeze()
    return Growth(*(now - earlier for now, earlier in zip(after, before, strict=True)))


def operator_calls(device: str) -> dict[str, Callable[[], object]]:
    """A forward and, where there is one, a backward of every operator, on a few tokens."""
    calls: dict[str, Callable[[], object]] = {"inter_sink_bias": bias_call(device)}
    for name, case in CASES.items():
        if not name.endswith("triton") or device != "cpu":  # where it is interpreted
            served = case.function is recattn.lrea_absorbed_attention or "item_ids" in case.inputs()
            calls[name] = call_of(case.function, case.inputs(), device, differentiates=not served)
    return calls


def bias_call(device: str) -> Callable[[], object]:
    inputs = {"q_s": torch.randn(2, 2, 3, 4), "k_s": torch.randn(2, 2, 3, 4), "bias_scale": torch.ones(1)}
    return call_of(recattn.inter_sink_bias, inputs, device, differentiates=True)


def call_of(
    function: Callable[..., Any], inputs: dict[str, Any], device: str, *, differentiates: bool
) -> Callable[[], object]:
    inputs = {name: x.detach().to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point()]
    if "refined" in function.__name__ or "wasserstein" in function.__name__:
        inputs["causal"] = True

    def call() -> None:
        outs = function(**inputs)
        if differentiates:
            outs = outs if isinstance(outs, tuple) else (outs,)
            torch.autograd.grad([x.sum() for x in outs], leaves)

    if differentiates:
        for x in leaves:
            x.requires_grad_()
    return call


# --- The command ---


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of each training, %(default)s by default")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2, %(default)s by default")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each")
    parser.add_argument("--calls", type=int, default=10_000, help="of each operator, %(default)s by default")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=("training", "processes", "leaks"), action="append")
    chosen = parser.parse_args(arguments)
    parts = chosen.only or ("training", "processes", "leaks")
    console, holds = Console(width=None if sys.stdout.isatty() else 140), True
    if "training" in parts:
        settings = replace(Settings(), steps=chosen.steps, dtype=getattr(torch, chosen.dtype), device=chosen.device)
        names = [f"{name}/{impl}" for name in MODELS for impl in (KERNELS, REFERENCE)]
        curves = []
        calls = [(name, seed) for seed in range(chosen.seeds) for name in names]
        for curve in train_all(train, calls, chosen.jobs, settings):
            curves.append(curve)
            console.print(
                f"{curve.name} by {curve.impl}, seed {curve.seed}: {statistics.mean(curve.losses[-100:]):.4f}"
            )
        table, right = training_table(curves)
        console.print(f"{chosen.steps} steps, {chosen.dtype}, {chosen.device}, {chosen.seeds} seeds")
        console.print(table)
        holds &= right
    if "processes" in parts:
        table = new_table(("model", "by"), ("largest difference of a parameter",))
        for (name, how), error in two_processes(rounds=5).items():
            table.add_row(name, how, f"{error:.1e}")
            holds &= error < 1e-5
        console.print(table)
    if "leaks" in parts:
        table = new_table(("operator, case",), ("calls", "objects", "Python blocks", "RSS, KiB", "CUDA, bytes"))
        for name, call in operator_calls(chosen.device).items():
            grown = growth(call, chosen.calls, warm_up=200)
            table.add_row(name, f"{chosen.calls:,}", *map(str, grown))
            holds &= leaks_nothing(grown, chosen.calls)
        console.print(table)
    console.print("all holds" if holds else "FAILED")
    return 0 if holds else 1


def leaks_nothing(grown: Growth, calls: int) -> bool:
    """Less than a twentieth of an object or block a call and 64 bytes of memory, beside what Python itself keeps."""
    few = 500 + calls // 20
    return grown.objects < few and grown.blocks < few and grown.rss_kib < 8192 + calls // 16 and grown.cuda_bytes == 0


if __name__ == "__main__":
    sys.exit(main())

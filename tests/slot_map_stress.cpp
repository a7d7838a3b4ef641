// Threads at one SlotMap, under ThreadSanitizer: the states they write and read are plain memory, so that a row given
// to somebody while it is read, or found before it is written, is a data race.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "slot_map.h"

namespace {

using recattn::SlotMap;

constexpr int64_t kUsers = 96, kFirstCapacity = 16, kLastCapacity = 64, kBatch = 8;
using State = std::array<int64_t, 4>;  // every entry names the owner

SlotMap map(kFirstCapacity);
std::array<State, kLastCapacity> states;
std::atomic<bool> over = false;
std::atomic<int64_t> reads = 0, writes = 0, no_room = 0, mixed = 0;

using Batch = std::array<int64_t, kBatch>;

Batch random_ids(std::mt19937_64& random) {
    Batch ids;
    for (int64_t& id : ids) id = static_cast<int64_t>(random() % kUsers);
    return ids;
}

void run_reader(uint64_t seed) {
    std::mt19937_64 random(seed);
    while (!over) {
        const Batch ids = random_ids(random);
        Batch slots;
        map.acquire(ids, slots);
        for (int round = 0; round < 2; ++round) {
            for (int64_t i = 0; i < kBatch; ++i) {
                if (slots[i] == SlotMap::kMissing) continue;
                const State& state = states[slots[i]];
                if (!std::all_of(state.begin(), state.end(), [&](int64_t owner) { return owner == ids[i]; })) ++mixed;
                ++reads;
            }
            std::this_thread::yield();
        }
        map.release(slots);
    }
}

void run_writer(uint64_t seed) {
    std::mt19937_64 random(seed);
    while (!over) {
        const Batch ids = random_ids(random);
        Batch slots;
        try {
            map.reserve(ids, slots);
        } catch (const std::runtime_error&) {
            ++no_room;
            continue;
        }
        for (int64_t i = 0; i < kBatch; ++i) states[slots[i]].fill(ids[i]);
        if (random() % 8 == 0) {
            map.abandon(slots);
        } else {
            map.publish(slots);
            ++writes;
        }
    }
}

void run_eraser(uint64_t seed) {
    std::mt19937_64 random(seed);
    while (!over) {
        map.erase(random_ids(random));
        std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
}

}  // namespace

int main() {
    std::vector<std::thread> threads;
    for (uint64_t seed = 0; seed < 3; ++seed) threads.emplace_back(run_reader, seed);
    for (uint64_t seed = 3; seed < 5; ++seed) threads.emplace_back(run_writer, seed);
    threads.emplace_back(run_eraser, 5);
    for (int64_t capacity = kFirstCapacity; capacity <= kLastCapacity; ++capacity) {
        std::this_thread::sleep_for(std::chrono::milliseconds(40));
        map.grow(capacity);
    }
    over = true;
    for (std::thread& thread : threads) thread.join();

    // Every row is free, or found by its user: none was lost.
    std::vector<int64_t> everybody(kLastCapacity), slots(kLastCapacity);
    for (int64_t i = 0; i < kLastCapacity; ++i) everybody[i] = kUsers + i;
    map.reserve(everybody, slots);
    std::printf("reads %ld writes %ld no room %ld evictions %ld mixed %ld left %ld\n", reads.load(), writes.load(),
                no_room.load(), map.stats().evictions, mixed.load(), map.size());
    return mixed == 0 && reads > 0 && writes > 0 && no_room > 0 && map.stats().evictions > 0 && map.size() == 0 ? 0 : 1;
}

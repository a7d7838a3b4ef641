// Threads at one SlotMap, for the sanitizers: the states they write and read are plain memory, so that a row given to
// somebody while it is read, or found before it is written, is a data race. One thread writes the very arrays that
// others have handed to a call.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <random>
#include <span>
#include <stdexcept>
#include <thread>
#include <vector>

#include "slot_map/slot_map.h"

namespace {

using recattn::SlotMap;

constexpr int64_t kUsers = 96, kFirstCapacity = 16, kLastCapacity = 64, kBatch = 8;
using State = std::array<int64_t, 4>;  // every entry names the owner

SlotMap map(kFirstCapacity);
std::array<State, kLastCapacity> states;
std::atomic<bool> over = false;
std::atomic<int64_t> reads = 0, writes = 0, no_room = 0, mixed = 0, refused = 0;

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
        for (int64_t i = 0; i < kBatch; ++i) {
            if (slots[i] != SlotMap::kMissing) states[slots[i]].fill(ids[i]);
        }
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

// What a caller's other thread writes to during a call.
Batch contested_ids{}, contested_slots{};

void run_scribbler(uint64_t seed) {
    std::mt19937_64 random(seed);
    constexpr std::array<int64_t, 4> kNoRows{SlotMap::kMissing, -7, kBatch, int64_t{1} << 40};
    while (!over) {
        for (int64_t i = 0; i < kBatch; ++i) {
            const int64_t draw = static_cast<int64_t>(random() % 16);
            __atomic_store_n(&contested_ids[i], static_cast<int64_t>(random() % kUsers), __ATOMIC_RELAXED);
            __atomic_store_n(&contested_slots[i], draw < kBatch ? draw : kNoRows[draw % 4], __ATOMIC_RELAXED);
        }
    }
}

void run_contested_ids() {
    for (int64_t round = 0; !over; ++round) {
        Batch slots;
        std::array<bool, kBatch> found;
        map.acquire(contested_ids, slots);
        for (const int64_t slot : slots) {
            if (slot == SlotMap::kMissing) continue;
            const State& state = states[slot];
            if (std::count(state.begin(), state.end(), state[0]) != static_cast<int64_t>(state.size())) ++mixed;
        }
        map.release(slots);
        map.contains(contested_ids, found);
        if (round % 32 != 0) continue;  // the readers are to find somebody
        map.erase(std::span(contested_ids).first(1));
        try {
            map.reserve(contested_ids, slots);
            map.abandon(slots);
        } catch (const std::runtime_error&) {
            ++no_room;
        }
    }
}

// Tries to lose a row of a map of its own: rows that are not what the call expects are refused, whenever they came.
void run_contested_slots(uint64_t seed) {
    std::mt19937_64 random(seed);
    SlotMap own(kBatch);
    const auto attempt = [&own](auto method, SlotMap::Slots slots) {
        try {
            (own.*method)(slots);
        } catch (const std::invalid_argument&) {
            ++refused;
        }
    };
    const SlotMap::Slots contested = std::span(contested_slots).first(2);
    Batch slots;
    while (!over) {
        const Batch ids = random_ids(random);
        own.reserve(ids, slots);
        attempt(&SlotMap::publish, contested);
        attempt(&SlotMap::abandon, contested);
        for (const int64_t& slot : slots) attempt(&SlotMap::publish, {&slot, 1});
        own.acquire(ids, slots);
        attempt(&SlotMap::release, contested);
        for (const int64_t& slot : slots) attempt(&SlotMap::release, {&slot, 1});
    }
    std::iota(slots.begin(), slots.end(), kUsers);
    own.reserve(Batch(slots), slots);  // an error if a row was lost
}

}  // namespace

int main() {
    std::vector<std::thread> threads;
    for (uint64_t seed = 0; seed < 3; ++seed) threads.emplace_back(run_reader, seed);
    for (uint64_t seed = 3; seed < 5; ++seed) threads.emplace_back(run_writer, seed);
    threads.emplace_back(run_eraser, 5);
    threads.emplace_back(run_scribbler, 6);
    threads.emplace_back(run_contested_ids);
    threads.emplace_back(run_contested_slots, 7);
    for (int64_t capacity = kFirstCapacity; capacity <= kLastCapacity; ++capacity) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        map.grow(capacity);
    }
    over = true;
    for (std::thread& thread : threads) thread.join();

    // Every row is free, or found by its user: none was lost.
    std::vector<int64_t> everybody(kLastCapacity), slots(kLastCapacity);
    for (int64_t i = 0; i < kLastCapacity; ++i) everybody[i] = kUsers + i;
    map.reserve(everybody, slots);
    std::printf("reads %ld writes %ld no room %ld evictions %ld refused %ld mixed %ld left %ld\n", reads.load(),
                writes.load(), no_room.load(), map.stats().evictions, refused.load(), mixed.load(), map.size());
    const bool worked = reads > 0 && writes > 0 && no_room > 0 && refused > 0 && map.stats().evictions > 0;
    return worked && mixed == 0 && map.size() == 0 ? 0 : 1;
}

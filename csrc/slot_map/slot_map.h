// SlotMap: which user's state is in which row of a state table. Lookups with pins, CLOCK eviction, growth. Thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <shared_mutex>
#include <span>
#include <vector>

#include "slot_map/id_index.h"

namespace recattn {

// A shared mutex that serves threads in turn. With std::shared_mutex alone, readers may starve a writer.
class FairSharedMutex {
  public:
    void lock() {
        const std::lock_guard turn(turn_);
        mutex_.lock();
    }
    void lock_shared() {
        const std::lock_guard turn(turn_);
        mutex_.lock_shared();
    }
    void unlock() { mutex_.unlock(); }
    void unlock_shared() { mutex_.unlock_shared(); }

  private:
    std::mutex turn_;
    std::shared_mutex mutex_;
};

// A row is free, reserved (its state is being written), published (lookups find it), or retired (its user has another
// row or none, but requests still read this one). A batch takes the lock once. If another thread writes to `ids` or
// `slots` during a call, the call sees the old or the new value; nothing else goes wrong.
class SlotMap {
  public:
    static constexpr int64_t kMissing = IdIndex::kAbsent;
    using Ids = std::span<const int64_t>;
    using Slots = std::span<const int64_t>;

    struct Stats {
        int64_t hits, misses, evictions;
    };

    explicit SlotMap(int64_t capacity);

    // The row of each id, or kMissing. Found rows are pinned: they are not reused before their release.
    void acquire(Ids ids, std::span<int64_t> slots);
    // Unpins rows returned by `acquire`; skips kMissing.
    void release(Slots slots);
    void contains(Ids ids, std::span<bool> found) const;

    // A row to write for each id, which lookups do not find before `publish`. Evicts users if no row is free, those in
    // `ids` last. If an id occurs twice, only the last occurrence gets a row, the others kMissing.
    void reserve(Ids ids, std::span<int64_t> slots);
    // Lets lookups find the reserved rows, in the order given: the last row of an id counts. `abandon` frees reserved
    // rows. Both skip kMissing.
    void publish(Slots slots);
    void abandon(Slots slots);

    // Forgets the ids. Returns how many of them were known.
    int64_t erase(Ids ids);
    void grow(int64_t capacity);

    // Ids of published rows, in the order of the rows.
    std::vector<int64_t> ids() const;
    int64_t size() const;
    int64_t capacity() const;
    int64_t nbytes() const;
    Stats stats() const;

  private:
    enum class State : uint8_t { kFree, kReserved, kPublished, kRetired };

    struct Row {
        int64_t id = 0;                        // in a free row: the next free row
        std::atomic<uint32_t> pins = 0;        // this and `referenced` change under the shared lock
        std::atomic<bool> referenced = false;  // since the last pass of the CLOCK hand
        State state = State::kFree;

        void pin();
        uint32_t unpin();
    };

    void find(Ids ids, int64_t* slots) const;
    int64_t free_rows() const;
    int64_t take_free_row();
    void recycle(int64_t slot);
    void retire(int64_t slot);
    std::vector<int64_t> choose_victims(int64_t wanted, Ids spared);
    void sweep(size_t count, std::vector<int64_t>& victims);
    void move_reserved(Slots slots, State to);

    mutable FairSharedMutex mutex_;
    std::mutex free_mutex_;  // guards the list of free rows among holders of the shared lock
    IdIndex index_;
    std::vector<Row> rows_;
    int64_t used_ = 0;  // rows from here on were never used
    int64_t first_free_ = kMissing, num_free_ = 0;
    int64_t hand_ = 0, size_ = 0, evictions_ = 0;
    std::atomic<int64_t> hits_ = 0, misses_ = 0;
};

}  // namespace recattn

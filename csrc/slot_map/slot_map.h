// Which user's state lies in which row of a state table: lookups with pins, CLOCK eviction, growth. Thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <shared_mutex>
#include <span>
#include <vector>

#include "slot_map/id_index.h"

namespace recattn {

// Whoever waits comes next: std::shared_mutex alone may let readers starve a writer.
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

// A row is free, or reserved (its state is being written), or published (its user's lookups find it), or retired (its
// user has another row by now or none, but requests still read this one). A batch takes the lock once. What another
// thread writes to `ids` or `slots` during a call may be read or not, and does no other harm.
class SlotMap {
  public:
    static constexpr int64_t kMissing = IdIndex::kAbsent;
    using Ids = std::span<const int64_t>;
    using Slots = std::span<const int64_t>;

    struct Stats {
        int64_t hits, misses, evictions;
    };

    explicit SlotMap(int64_t capacity);

    // The row of each id, or kMissing. Rows found are pinned: until their release nobody is given them.
    void acquire(Ids ids, std::span<int64_t> slots);
    // Takes what `acquire` gave; kMissing is skipped.
    void release(Slots slots);
    void contains(Ids ids, std::span<bool> found) const;

    // A row to write for each id, which nobody finds before it is published. Where no row is free, evicts users, those
    // in `ids` last. Of an id given twice only the last gets a row, the others kMissing.
    void reserve(Ids ids, std::span<int64_t> slots);
    // From now on the ids that the rows were reserved for find them, in the order given: the last of an id counts.
    // kMissing is skipped, here and by `abandon`.
    void publish(Slots slots);
    void abandon(Slots slots);

    // Returns how many there were.
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
        int64_t id = 0;                        // of a free row: the next free one
        std::atomic<uint32_t> pins = 0;        // this and `referenced` change under the shared lock
        std::atomic<bool> referenced = false;  // since the hand of the clock came by
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
    std::mutex free_mutex_;  // of the list of free rows, among holders of the shared lock
    IdIndex index_;
    std::vector<Row> rows_;
    int64_t used_ = 0;  // rows from here on were never given out
    int64_t first_free_ = kMissing, num_free_ = 0;
    int64_t hand_ = 0, size_ = 0, evictions_ = 0;
    std::atomic<int64_t> hits_ = 0, misses_ = 0;
};

}  // namespace recattn

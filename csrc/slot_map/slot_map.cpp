#include "slot_map/slot_map.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "common/read_once.h"

namespace recattn {
namespace {

// Number of lookups whose cache misses overlap.
constexpr size_t kBlock = 32;
constexpr int64_t kLargestCapacity = int64_t{1} << 40;

int64_t expect_capacity(int64_t capacity, int64_t least) {
    if (capacity < least || capacity > kLargestCapacity) {
        throw std::invalid_argument("capacity must be between " + std::to_string(least) + " and 2**40, got " +
                                    std::to_string(capacity));
    }
    return capacity;
}

[[noreturn]] void throw_invalid_slot(int64_t slot, const char* expected) {
    throw std::invalid_argument("slots must be " + std::string(expected) + ", got " + std::to_string(slot));
}

// Copies the caller's array: its other threads may write to it during the call, after it was checked.
std::vector<int64_t> snapshot(std::span<const int64_t> entries) {
    std::vector<int64_t> copy(entries.size());
    std::transform(entries.begin(), entries.end(), copy.begin(), read_once<int64_t>);
    return copy;
}

std::vector<int64_t> snapshot_rows(SlotMap::Slots slots) {
    std::vector<int64_t> rows(slots.size());
    auto end = rows.begin();
    for (const int64_t& slot : slots) {
        *end = read_once(slot);
        if (*end != SlotMap::kMissing) ++end;
    }
    rows.erase(end, rows.end());
    return rows;
}

// Sets slots[i] = kMissing if ids[i] occurs again later, else 0. Returns the number of distinct ids.
int64_t drop_repeated(SlotMap::Ids ids, std::span<int64_t> slots) {
    IdIndex seen(static_cast<int64_t>(ids.size()));
    int64_t distinct = 0;
    for (size_t i = ids.size(); i-- > 0;) {
        const bool last = seen.assign(ids[i], 0) == IdIndex::kAbsent;
        slots[i] = last ? 0 : SlotMap::kMissing;
        distinct += last;
    }
    return distinct;
}

}  // namespace

// Relaxed is enough: the map's lock orders pins and the reuse of a row.
void SlotMap::Row::pin() {
    pins.fetch_add(1, std::memory_order_relaxed);
    // Most rows are hot. Loading first keeps their cache line shared; a store would not.
    if (!referenced.load(std::memory_order_relaxed)) referenced.store(true, std::memory_order_relaxed);
}

// Returns the number of pins before; leaves 0 at 0.
uint32_t SlotMap::Row::unpin() {
    uint32_t before = pins.load(std::memory_order_relaxed);
    while (before > 0 && !pins.compare_exchange_weak(before, before - 1, std::memory_order_relaxed)) {
    }
    return before;
}

SlotMap::SlotMap(int64_t capacity) : index_(expect_capacity(capacity, 1)), rows_(static_cast<size_t>(capacity)) {}

// For at most kBlock ids.
void SlotMap::find(Ids ids, int64_t* slots) const {
    std::array<int64_t, kBlock> block;
    std::array<size_t, kBlock> homes;
    for (size_t i = 0; i < ids.size(); ++i) {
        block[i] = read_once(ids[i]);
        index_.prefetch(homes[i] = index_.home(block[i]));
    }
    for (size_t i = 0; i < ids.size(); ++i) slots[i] = index_.find(block[i], homes[i]);
}

void SlotMap::acquire(Ids ids, std::span<int64_t> slots) {
    const std::shared_lock lock(mutex_);
    int64_t hits = 0;
    for (size_t begin = 0; begin < ids.size(); begin += kBlock) {
        const size_t end = std::min(begin + kBlock, ids.size());
        find(ids.subspan(begin, end - begin), &slots[begin]);
        for (size_t i = begin; i < end; ++i) {
            if (slots[i] != kMissing) __builtin_prefetch(&rows_[slots[i]], 1);
        }
        for (size_t i = begin; i < end; ++i) {
            if (slots[i] == kMissing) continue;
            rows_[slots[i]].pin();
            ++hits;
        }
    }
    hits_.fetch_add(hits, std::memory_order_relaxed);
    misses_.fetch_add(static_cast<int64_t>(ids.size()) - hits, std::memory_order_relaxed);
}

void SlotMap::release(Slots given) {
    const std::vector<int64_t> slots = snapshot_rows(given);
    const std::shared_lock lock(mutex_);
    std::vector<int64_t> unpinned;
    for (size_t i = 0; i < slots.size(); ++i) {
        if (i + kBlock < slots.size()) __builtin_prefetch(rows_.data() + slots[i + kBlock], 1);
        const bool exists = slots[i] >= 0 && slots[i] < static_cast<int64_t>(rows_.size());
        const uint32_t pins = exists ? rows_[slots[i]].unpin() : 0;
        if (pins == 0) {
            for (size_t undone = 0; undone < i; ++undone) rows_[slots[undone]].pin();
            throw_invalid_slot(slots[i], "pinned rows or -1");
        }
        // A retired row cannot be pinned again, so exactly one thread removes its last pin.
        if (pins == 1 && rows_[slots[i]].state == State::kRetired) unpinned.push_back(slots[i]);
    }
    if (unpinned.empty()) return;
    const std::lock_guard free_lock(free_mutex_);
    for (const int64_t slot : unpinned) recycle(slot);
}

void SlotMap::contains(Ids ids, std::span<bool> found) const {
    const std::shared_lock lock(mutex_);
    std::array<int64_t, kBlock> slots;
    for (size_t begin = 0; begin < ids.size(); begin += kBlock) {
        const Ids block = ids.subspan(begin, std::min(kBlock, ids.size() - begin));
        find(block, slots.data());
        for (size_t i = 0; i < block.size(); ++i) found[begin + i] = slots[i] != kMissing;
    }
}

void SlotMap::reserve(Ids given, std::span<int64_t> slots) {
    const std::vector<int64_t> ids = snapshot(given);
    const int64_t distinct = drop_repeated(ids, slots);
    const std::lock_guard lock(mutex_);
    const std::vector<int64_t> victims = choose_victims(distinct, ids);
    for (const int64_t victim : victims) index_.erase(rows_[victim].id);
    size_ -= static_cast<int64_t>(victims.size());
    evictions_ += static_cast<int64_t>(victims.size());
    auto victim = victims.begin();
    for (size_t i = 0; i < ids.size(); ++i) {
        if (slots[i] == kMissing) continue;
        slots[i] = victim != victims.end() ? *victim++ : take_free_row();
        Row& row = rows_[slots[i]];
        row.id = ids[i];
        row.referenced = false;
        row.state = State::kReserved;
    }
}

// Rows to evict so that `wanted` rows are free: published and unpinned ones, those of the ids in `spared` last. If they
// do not suffice, raises an error and changes nothing.
std::vector<int64_t> SlotMap::choose_victims(int64_t wanted, Ids spared) {
    const int64_t count = wanted - free_rows();
    std::vector<int64_t> victims;
    if (count <= 0) return victims;
    if (count <= static_cast<int64_t>(rows_.size())) {
        victims.reserve(static_cast<size_t>(count));
        std::vector<int64_t> own;
        for (const int64_t id : spared) {
            const int64_t slot = index_.find(id, index_.home(id));
            if (slot != kMissing) own.push_back(slot);
        }
        for (const int64_t slot : own) rows_[slot].pins.fetch_add(1, std::memory_order_relaxed);
        sweep(static_cast<size_t>(count), victims);
        for (const int64_t slot : own) rows_[slot].unpin();
        sweep(static_cast<size_t>(count), victims);
    }
    if (static_cast<int64_t>(victims.size()) < count) {
        for (const int64_t victim : victims) rows_[victim].state = State::kPublished;
        throw std::runtime_error("no room for " + std::to_string(wanted) + " users: of " +
                                 std::to_string(rows_.size()) + " rows " + std::to_string(free_rows()) +
                                 " are free and " + std::to_string(victims.size()) +
                                 " can be evicted; the others are pinned by requests or reserved: grow the table");
    }
    return victims;
}

// CLOCK: the hand goes round at most twice. A row referenced since the last pass is skipped once.
void SlotMap::sweep(size_t count, std::vector<int64_t>& victims) {
    const int64_t capacity = static_cast<int64_t>(rows_.size());
    for (int64_t step = 0; victims.size() < count && step < 2 * capacity; ++step) {
        Row& row = rows_[hand_];
        if (row.state == State::kPublished && row.pins == 0 && !row.referenced.exchange(false)) {
            victims.push_back(hand_);
            row.state = State::kReserved;
        }
        hand_ = hand_ + 1 == capacity ? 0 : hand_ + 1;
    }
}

void SlotMap::publish(Slots given) {
    const std::vector<int64_t> slots = snapshot_rows(given);
    const std::lock_guard lock(mutex_);
    move_reserved(slots, State::kPublished);
    for (const int64_t slot : slots) {
        const int64_t previous = index_.assign(rows_[slot].id, slot);
        if (previous == kMissing) {
            ++size_;
        } else {
            rows_[slot].referenced = rows_[previous].referenced.load();
            retire(previous);
        }
    }
}

void SlotMap::abandon(Slots given) {
    const std::vector<int64_t> slots = snapshot_rows(given);
    const std::lock_guard lock(mutex_);
    move_reserved(slots, State::kFree);
    for (const int64_t slot : slots) recycle(slot);
}

// Changes the state of all rows, or raises an error and changes none. A slot given twice is an error.
void SlotMap::move_reserved(Slots slots, State to) {
    for (size_t i = 0; i < slots.size(); ++i) {
        const bool exists = slots[i] >= 0 && slots[i] < static_cast<int64_t>(rows_.size());
        if (!exists || rows_[slots[i]].state != State::kReserved) {
            for (const int64_t slot : slots.first(i)) rows_[slot].state = State::kReserved;
            throw_invalid_slot(slots[i], "reserved rows, each once");
        }
        rows_[slots[i]].state = to;
    }
}

int64_t SlotMap::erase(Ids ids) {
    const std::lock_guard lock(mutex_);
    int64_t erased = 0;
    for (const int64_t& id : ids) {
        const int64_t slot = index_.erase(read_once(id));
        if (slot == kMissing) continue;
        retire(slot);
        ++erased;
    }
    size_ -= erased;
    return erased;
}

void SlotMap::grow(int64_t capacity) {
    const std::lock_guard lock(mutex_);
    expect_capacity(capacity, static_cast<int64_t>(rows_.size()));
    IdIndex index(capacity);
    std::vector<Row> rows(static_cast<size_t>(capacity));
    for (size_t slot = 0; slot < rows_.size(); ++slot) {
        rows[slot].id = rows_[slot].id;
        rows[slot].pins = rows_[slot].pins.load();
        rows[slot].referenced = rows_[slot].referenced.load();
        rows[slot].state = rows_[slot].state;
        if (rows[slot].state == State::kPublished) index.assign(rows[slot].id, static_cast<int64_t>(slot));
    }
    std::swap(index_, index);
    std::swap(rows_, rows);
}

int64_t SlotMap::free_rows() const { return num_free_ + static_cast<int64_t>(rows_.size()) - used_; }

int64_t SlotMap::take_free_row() {
    if (first_free_ == kMissing) return used_++;
    --num_free_;
    return std::exchange(first_free_, rows_[first_free_].id);
}

void SlotMap::recycle(int64_t slot) {
    rows_[slot].state = State::kFree;
    rows_[slot].id = std::exchange(first_free_, slot);
    ++num_free_;
}

// For a published row that no id maps to any more: recycles it, now or when its last pin is gone.
void SlotMap::retire(int64_t slot) {
    if (rows_[slot].pins == 0) {
        recycle(slot);
    } else {
        rows_[slot].state = State::kRetired;
    }
}

std::vector<int64_t> SlotMap::ids() const {
    const std::shared_lock lock(mutex_);
    std::vector<int64_t> ids;
    ids.reserve(static_cast<size_t>(size_));
    for (const Row& row : rows_) {
        if (row.state == State::kPublished) ids.push_back(row.id);
    }
    return ids;
}

int64_t SlotMap::size() const {
    const std::shared_lock lock(mutex_);
    return size_;
}

int64_t SlotMap::capacity() const {
    const std::shared_lock lock(mutex_);
    return static_cast<int64_t>(rows_.size());
}

int64_t SlotMap::nbytes() const {
    const std::shared_lock lock(mutex_);
    return static_cast<int64_t>(index_.nbytes() + rows_.size() * sizeof(Row));
}

SlotMap::Stats SlotMap::stats() const {
    const std::shared_lock lock(mutex_);
    return {hits_, misses_, evictions_};
}

}  // namespace recattn

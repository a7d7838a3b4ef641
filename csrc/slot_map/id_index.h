// Hash table from int64 ids to rows: open addressing, linear probing, fixed size, at most 2/3 full.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace recattn {

class IdIndex {
  public:
    static constexpr int64_t kAbsent = -1;

    // Room for `capacity` ids.
    explicit IdIndex(int64_t capacity) : entries_(static_cast<size_t>(capacity + (capacity + 1) / 2 + 1)) {}

    // First entry to probe for an id: the high bits of hash · size, which works for any size.
    size_t home(int64_t id) const {
        return static_cast<size_t>((static_cast<unsigned __int128>(mix(id)) * entries_.size()) >> 64);
    }
    void prefetch(size_t home) const { __builtin_prefetch(&entries_[home]); }

    int64_t find(int64_t id, size_t home) const { return entries_[locate(id, home)].row; }

    // Maps the id to the row; returns the row it had, or kAbsent.
    int64_t assign(int64_t id, int64_t row) {
        Entry& entry = entries_[locate(id, home(id))];
        entry.id = id;
        return std::exchange(entry.row, row);
    }

    // Returns the row that the id had, or kAbsent.
    int64_t erase(int64_t id) {
        size_t hole = locate(id, home(id));
        const int64_t row = entries_[hole].row;
        if (row == kAbsent) return kAbsent;
        // Moves later entries into the hole unless that puts them before their home, so that no tombstones are needed.
        for (size_t at = next(hole); entries_[at].row != kAbsent; at = next(at)) {
            if (distance(home(entries_[at].id), at) >= distance(hole, at)) {
                entries_[hole] = entries_[at];
                hole = at;
            }
        }
        entries_[hole].row = kAbsent;
        return row;
    }

    size_t nbytes() const { return entries_.size() * sizeof(Entry); }

  private:
    struct Entry {
        int64_t id;
        int64_t row = kAbsent;
    };

    // Mixes every bit of the id into the high bits of the hash.
    static uint64_t mix(int64_t id) {
        uint64_t hash = static_cast<uint64_t>(id);
        hash = (hash ^ (hash >> 32)) * 0x9E3779B97F4A7C15;
        return (hash ^ (hash >> 29)) * 0xD6E8FEB86659FD93;
    }
    size_t next(size_t at) const { return at + 1 == entries_.size() ? 0 : at + 1; }
    size_t distance(size_t from, size_t to) const { return to >= from ? to - from : to + entries_.size() - from; }

    // Position of the id, or of the empty entry where it would go.
    size_t locate(int64_t id, size_t at) const {
        while (entries_[at].row != kAbsent && entries_[at].id != id) at = next(at);
        return at;
    }

    std::vector<Entry> entries_;
};

}  // namespace recattn

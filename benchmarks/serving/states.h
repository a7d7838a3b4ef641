// The states of recattn.serving's stores without Python: records of LMDB or Redis, checked as `get_many` checks them.
#pragma once
#include <ATen/ops/empty.h>
#include <endian.h>
#include <hiredis/hiredis.h>
#include <lmdb.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace states {

using Users = std::vector<int64_t>;
using Visit = std::function<void(size_t, std::string_view)>;  // of a user's position and record, null if there is none
using Store = std::function<void(const Users&, const Visit&)>;

struct Header {         // the first 64 bytes of a record
    uint64_t checksum;  // XXH3-64 of all that follows
    char identity[32];  // the same in all records of a schema
    int64_t user_id, event_id;
    uint32_t expires, build;
};

inline void check_lmdb(int error, const std::string& what) {
    if (error) throw std::runtime_error(what + ": " + mdb_strerror(error));
}

inline Store open_lmdb(const std::string& path) {
    MDB_env* env;
    MDB_txn* txn;
    MDB_dbi database;
    check_lmdb(mdb_env_create(&env), "mdb_env_create");
    check_lmdb(mdb_env_set_maxdbs(env, 3), "mdb_env_set_maxdbs");
    check_lmdb(mdb_env_open(env, path.c_str(), MDB_RDONLY | MDB_NORDAHEAD, 0), path);
    check_lmdb(mdb_txn_begin(env, nullptr, MDB_RDONLY, &txn), "mdb_txn_begin");
    check_lmdb(mdb_dbi_open(txn, "states", 0, &database), "states");
    check_lmdb(mdb_txn_commit(txn), "mdb_txn_commit");
    return [env, database](const Users& users, const Visit& visit) {
        MDB_txn* begun;
        check_lmdb(mdb_txn_begin(env, nullptr, MDB_RDONLY, &begun), "mdb_txn_begin");
        const std::unique_ptr<MDB_txn, decltype(&mdb_txn_abort)> txn(begun, mdb_txn_abort);
        for (size_t u = 0; u < users.size(); ++u) {
            uint64_t big_endian = htobe64(users[u]);
            MDB_val key{sizeof big_endian, &big_endian}, record{0, nullptr};
            const int error = mdb_get(txn.get(), database, &key, &record);
            if (error != MDB_NOTFOUND) check_lmdb(error, "mdb_get");
            visit(u, {static_cast<const char*>(record.mv_data), record.mv_size});
        }
    };
}

// A cluster takes a client that knows which node has which user, such as hiredis-cluster.
inline Store open_redis(const std::string& host, int port, const std::string& name_space) {
    const std::shared_ptr<redisContext> redis(redisConnect(host.c_str(), port), redisFree);
    if (redis->err) throw std::runtime_error(host + ": " + redis->errstr);
    redisSetTimeout(redis.get(), timeval{1, 0});
    return [redis, name_space](const Users& users, const Visit& visit) {
        std::vector<std::string> words{"MGET"};
        for (const int64_t user : users) words.push_back(name_space + ":{" + std::to_string(user) + "}");
        std::vector<const char*> pointers;
        std::vector<size_t> lengths;
        for (const auto& word : words) pointers.push_back(word.data()), lengths.push_back(word.size());
        void* answer = redisCommandArgv(redis.get(), int(words.size()), pointers.data(), lengths.data());
        const std::unique_ptr<redisReply, decltype(&freeReplyObject)> reply(static_cast<redisReply*>(answer),
                                                                            freeReplyObject);
        if (!reply) throw std::runtime_error(std::string("MGET: ") + redis->errstr);
        if (reply->type == REDIS_REPLY_ERROR) throw std::runtime_error(std::string("MGET: ") + reply->str);
        for (size_t u = 0; u < users.size(); ++u) visit(u, {reply->element[u]->str, reply->element[u]->len});
    };
}

// "ok", or why the user has no state to use. `empty` is a record of the schema, of a user without a state.
inline std::string status_of(std::string_view record, const std::string& empty, int64_t user) {
    if (!record.data()) return "missing";
    if (record.size() != empty.size()) return "refused:schema";
    Header header;
    std::memcpy(&header, record.data(), sizeof header);
    const char* identity = empty.data() + offsetof(Header, identity);
    if (std::memcmp(header.identity, identity, sizeof header.identity)) return "refused:schema";
    if (header.user_id != user) return "refused:user";
    const std::string_view hashed = record.substr(sizeof header.checksum);
    if (XXH3_64bits(hashed.data(), hashed.size()) != header.checksum) return "refused:checksum";
    return header.expires && header.expires <= std::time(nullptr) ? "expired" : "ok";
}

struct States {
    at::Tensor records;  // [U, nbytes] uint8, empty where a user has no state to use
    std::vector<std::string> status;
};

inline States read(const Store& store, const Users& users, const std::string& empty) {
    States states{at::empty({int64_t(users.size()), int64_t(empty.size())}, at::kByte), {}};
    if (users.empty()) return states;  // MGET of nothing is an error
    auto* rows = static_cast<char*>(states.records.mutable_data_ptr());
    store(users, [&](size_t u, std::string_view record) {
        states.status.push_back(status_of(record, empty, users[u]));
        std::memcpy(rows + u * empty.size(), states.status[u] == "ok" ? record.data() : empty.data(), empty.size());
    });
    return states;
}

}  // namespace states

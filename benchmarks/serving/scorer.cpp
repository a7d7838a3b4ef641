// scorer FOLDER LMDB [TIMES]: score candidates with what recattn.serving.export_scorer made, from states in LMDB.
//
// Reads a line per user: its id, then item ids. An empty line ends a batch, which is looked up and scored at once.
// Answers each line by the user id, "ok" or why there is no state to use, and the scores as hexadecimal floats. A user
// without a state is scored with zeros. With TIMES, a file, it writes there how many ms each batch took to read and
// score.
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <dlfcn.h>
#include <endian.h>
#include <lmdb.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <chrono>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>

struct Header {         // the first 64 bytes of a record
    uint64_t checksum;  // XXH3-64 of all that follows
    char identity[32];  // the same in all records of a schema
    int64_t user_id, event_id;
    uint32_t expires, build;
};

struct Batch {
    std::vector<int64_t> users, items, offsets{0};
    std::vector<std::string> status;
};

void check(int error, const std::string& what) {
    if (error) throw std::runtime_error(what + ": " + mdb_strerror(error));
}

std::string status_of(const MDB_val& record, const std::string& empty, int64_t user) {
    Header header;
    if (record.mv_size != empty.size()) return "refused:schema";
    std::memcpy(&header, record.mv_data, sizeof header);
    const char* identity = empty.data() + offsetof(Header, identity);
    if (std::memcmp(header.identity, identity, sizeof header.identity)) return "refused:schema";
    if (header.user_id != user) return "refused:user";
    const auto* hashed = static_cast<const char*>(record.mv_data) + sizeof header.checksum;
    if (XXH3_64bits(hashed, record.mv_size - sizeof header.checksum) != header.checksum) return "refused:checksum";
    return header.expires && header.expires <= std::time(nullptr) ? "expired" : "ok";
}

at::Tensor read(MDB_env* env, MDB_dbi states, const std::string& empty, Batch& batch) {
    at::Tensor records = at::empty({int64_t(batch.users.size()), int64_t(empty.size())}, at::kByte);
    auto* row = static_cast<char*>(records.mutable_data_ptr());
    batch.status.clear();
    MDB_txn* txn;
    check(mdb_txn_begin(env, nullptr, MDB_RDONLY, &txn), "mdb_txn_begin");
    for (const int64_t user : batch.users) {
        uint64_t big_endian = htobe64(user);
        MDB_val key{sizeof big_endian, &big_endian}, record;
        const int error = mdb_get(txn, states, &key, &record);
        if (error != MDB_NOTFOUND) check(error, "mdb_get");
        batch.status.push_back(error ? "missing" : status_of(record, empty, user));
        std::memcpy(row, batch.status.back() == "ok" ? record.mv_data : empty.data(), empty.size());
        row += empty.size();
    }
    mdb_txn_abort(txn);
    return records;
}

int main(int argc, char** argv) {
    if (argc < 3) throw std::runtime_error("usage: scorer FOLDER LMDB [TIMES]");
    const std::filesystem::path folder = argv[1];
    for (const auto& library : std::filesystem::directory_iterator(folder / "ops"))
        if (!dlopen(library.path().c_str(), RTLD_NOW)) throw std::runtime_error(dlerror());
    torch::inductor::AOTIModelPackageLoader package(folder / "1" / "model.pt2");
    std::ifstream file(folder / "1" / "empty_record.bin", std::ios::binary);
    const std::string empty{std::istreambuf_iterator<char>(file), {}};

    MDB_env* env;
    MDB_txn* txn;
    MDB_dbi states;
    check(mdb_env_create(&env), "mdb_env_create");
    check(mdb_env_set_maxdbs(env, 3), "mdb_env_set_maxdbs");
    check(mdb_env_open(env, argv[2], MDB_RDONLY | MDB_NORDAHEAD, 0), argv[2]);
    check(mdb_txn_begin(env, nullptr, MDB_RDONLY, &txn), "mdb_txn_begin");
    check(mdb_dbi_open(txn, "states", 0, &states), "states");
    check(mdb_txn_commit(txn), "mdb_txn_commit");

    const auto ids = [](std::vector<int64_t>& x) { return at::from_blob(x.data(), {int64_t(x.size())}, at::kLong); };
    std::ofstream times(argc > 3 ? argv[3] : "/dev/null");
    Batch batch;
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        if (int64_t id; words >> id) {
            batch.users.push_back(id);
            while (words >> id) batch.items.push_back(id);
            batch.offsets.push_back(batch.items.size());
            continue;
        }
        const auto start = std::chrono::steady_clock::now();
        const at::Tensor records = read(env, states, empty, batch);
        const at::Tensor scores = package.run({records, ids(batch.items), ids(batch.offsets)})[0];
        times << std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count() << "\n";
        const int64_t columns = scores.dim() == 1 ? 1 : scores.size(1);
        for (size_t u = 0; u < batch.users.size(); ++u) {
            std::printf("%ld %s", batch.users[u], batch.status[u].c_str());
            for (int64_t i = batch.offsets[u] * columns; i < batch.offsets[u + 1] * columns; ++i)
                std::printf(" %a", scores.const_data_ptr<float>()[i]);
            std::printf("\n");
        }
        std::fflush(stdout);
        batch = {};
    }
}

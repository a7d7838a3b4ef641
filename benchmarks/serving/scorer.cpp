// scorer FOLDER STORE [TIMES]: score candidates with what recattn.serving.export_scorer made. STORE is where the states
// are: the folder of an LMDBStore, or redis:HOST:PORT:NAMESPACE.
//
// Reads a line per user: its id, then item ids. An empty line ends a batch, which is looked up and scored at once.
// Answers each line by the user id, "ok" or why there is no state to use, and the scores as hexadecimal floats. A user
// without a state is scored with zeros. With TIMES, a file, it writes there how many ms each batch took to read and
// score.
#include <ATen/ops/from_blob.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>

#include "states.h"

states::Store open_store(const std::string& address) {
    std::istringstream words(address);
    std::string kind, host, port, name_space;
    std::getline(words, kind, ':');
    if (kind != "redis") return states::open_lmdb(address);
    std::getline(std::getline(std::getline(words, host, ':'), port, ':'), name_space);
    return states::open_redis(host, std::stoi(port), name_space);
}

int main(int argc, char** argv) {
    if (argc < 3) throw std::runtime_error("usage: scorer FOLDER STORE [TIMES]");
    const std::filesystem::path folder = argv[1];
    for (const auto& library : std::filesystem::directory_iterator(folder / "ops"))
        if (!dlopen(library.path().c_str(), RTLD_NOW)) throw std::runtime_error(dlerror());
    torch::inductor::AOTIModelPackageLoader package(folder / "1" / "model.pt2");
    std::ifstream file(folder / "1" / "empty_record.bin", std::ios::binary);
    const std::string empty{std::istreambuf_iterator<char>(file), {}};
    const states::Store store = open_store(argv[2]);
    std::ofstream times(argc > 3 ? argv[3] : "/dev/null");

    const auto ids = [](std::vector<int64_t>& x) { return at::from_blob(x.data(), {int64_t(x.size())}, at::kLong); };
    std::vector<int64_t> users, items, offsets{0};
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        if (int64_t id; words >> id) {
            users.push_back(id);
            while (words >> id) items.push_back(id);
            offsets.push_back(items.size());
            continue;
        }
        const auto start = std::chrono::steady_clock::now();
        const states::States read = states::read(store, users, empty);
        const at::Tensor scores = package.run({read.records, ids(items), ids(offsets)})[0];
        times << std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count() << "\n";
        const int64_t columns = scores.dim() == 1 ? 1 : scores.size(1);
        for (size_t u = 0; u < users.size(); ++u) {
            std::printf("%ld %s", users[u], read.status[u].c_str());
            for (int64_t i = offsets[u] * columns; i < offsets[u + 1] * columns; ++i)
                std::printf(" %a", scores.const_data_ptr<float>()[i]);
            std::printf("\n");
        }
        std::fflush(stdout);
        users.clear(), items.clear(), offsets = {0};
    }
}

// The Python module recattn._slot_map (pybind11): SlotMap, and the compiler of this build.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <span>
#include <stdexcept>
#include <string>

#include "slot_map/slot_map.h"

namespace py = pybind11;

namespace {

using recattn::SlotMap;
using Int64Array = py::array_t<int64_t, py::array::c_style>;

std::string compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "g++ " __VERSION__;
#else
    return "unknown compiler";
#endif
}

py::dict build_info() {
    py::dict info;
    info["compiler"] = compiler();
    info["cxx_standard"] = static_cast<long>(__cplusplus);
    return info;
}

// An array-like of integers, such as a CPU tensor, as int64. Copied unless it is contiguous int64.
Int64Array int64_array(const char* name, const py::object& values) {
    const py::array array(values);
    const bool empty = array.size() == 0;  // any dtype, because numpy makes an empty list float64
    if (array.ndim() != 1 || (array.dtype().kind() != 'i' && !empty)) {
        throw std::invalid_argument(std::string(name) + " must be int64 [n], got " +
                                    std::string(py::str(array.dtype())) + " " +
                                    std::string(py::str(py::list(array.attr("shape")))));
    }
    return empty ? Int64Array(0) : Int64Array(array);
}

std::span<const int64_t> read(const Int64Array& array) { return {array.data(), static_cast<size_t>(array.size())}; }

template <class T>
std::span<T> write(py::array_t<T>& array) {
    return {array.mutable_data(), static_cast<size_t>(array.size())};
}

using Fill = void (SlotMap::*)(SlotMap::Ids, std::span<int64_t>);
using Change = void (SlotMap::*)(SlotMap::Slots);

// ids -> slots
template <Fill fill>
py::array_t<int64_t> slots_of(SlotMap& map, const py::object& values) {
    const Int64Array ids = int64_array("ids", values);
    py::array_t<int64_t> slots(ids.size());
    const auto from = read(ids);
    const auto to = write(slots);
    {
        const py::gil_scoped_release release;
        (map.*fill)(from, to);
    }
    return slots;
}

template <Change change>
void change_slots(SlotMap& map, const py::object& values) {
    const Int64Array slots = int64_array("slots", values);
    const auto from = read(slots);
    const py::gil_scoped_release release;
    (map.*change)(from);
}

py::array_t<bool> contains(const SlotMap& map, const py::object& values) {
    const Int64Array ids = int64_array("ids", values);
    py::array_t<bool> found(ids.size());
    const auto from = read(ids);
    const auto to = write(found);
    {
        const py::gil_scoped_release release;
        map.contains(from, to);
    }
    return found;
}

int64_t erase(SlotMap& map, const py::object& values) {
    const Int64Array ids = int64_array("ids", values);
    const auto from = read(ids);
    const py::gil_scoped_release release;
    return map.erase(from);
}

py::array_t<int64_t> ids(const SlotMap& map) {
    std::vector<int64_t> ids;
    {
        const py::gil_scoped_release release;
        ids = map.ids();
    }
    return py::array_t<int64_t>(static_cast<py::ssize_t>(ids.size()), ids.data());
}

py::dict stats(const SlotMap& map) {
    const SlotMap::Stats stats = map.stats();
    py::dict named;
    named["hits"] = stats.hits;
    named["misses"] = stats.misses;
    named["evictions"] = stats.evictions;
    return named;
}

void bind_slot_map(py::module_& module) {
    using Released = py::call_guard<py::gil_scoped_release>;
    py::class_<SlotMap>(module, "SlotMap", R"(int64 user id -> row of a state table, in [0, capacity).

Methods take batches: integer arrays [n] (numpy, or CPU tensors). They are thread-safe, take one lock per batch (lookups
share it) and release the GIL. Read a row between `acquire` and `release`; write it between `reserve` and `publish`. A row
is never written while it is being read, and lookups do not find it before it is published.

Raises ValueError for invalid arguments. A call that raises has changed nothing.)")
        .def(py::init<int64_t>(), py::arg("capacity"), Released())
        .def("acquire", &slots_of<&SlotMap::acquire>, py::arg("ids"),
             "The row of each id, or -1. Found rows are pinned, once per occurrence, and not reused before `release`.")
        .def("release", &change_slots<&SlotMap::release>, py::arg("slots"),
             "Unpin rows returned by `acquire`; -1 is skipped.")
        .def("contains", &contains, py::arg("ids"),
             "Whether each id has a row, as bool [n]. Does not pin, and does not count as hit or miss.")
        .def("reserve", &slots_of<&SlotMap::reserve>, py::arg("ids"),
             "A row to write for each id, which lookups do not find before `publish`. If an id occurs twice, only the "
             "last occurrence gets a row, the others -1. If no row is free, evicts unpinned users (CLOCK: those not "
             "looked up recently), those of `ids` last. RuntimeError if that does not suffice.")
        .def(
            "publish", &change_slots<&SlotMap::publish>, py::arg("slots"),
            "Let lookups find reserved rows under their ids. The last row of an id counts; -1 is skipped. The row that "
            "an id had before is reused after its last pin is gone.")
        .def("abandon", &change_slots<&SlotMap::abandon>, py::arg("slots"), "Free reserved rows; -1 is skipped.")
        .def("erase", &erase, py::arg("ids"), "Forget the ids. Returns how many of them were known.")
        .def("grow", &SlotMap::grow, py::arg("capacity"), Released(),
             "Increase the capacity. Existing rows keep their numbers, pins and users.")
        .def("ids", &ids, "The ids that have rows, int64 [len].")
        .def("stats", &stats, "Counts since construction: hits and misses of `acquire`, and evictions.")
        .def("__len__", &SlotMap::size, Released())
        .def("__repr__",
             [](const SlotMap& map) {
                 return "SlotMap(" + std::to_string(map.size()) + " of " + std::to_string(map.capacity()) + ")";
             })
        .def_property_readonly("capacity", py::cpp_function(&SlotMap::capacity, Released()))
        .def_property_readonly("nbytes", py::cpp_function(&SlotMap::nbytes, Released()));
}

}  // namespace

PYBIND11_MODULE(_slot_map, module) {
    module.doc() = "SlotMap: which user's state is in which row of a state table.";
    module.def("build_info", &build_info, "The compiler and C++ standard that this build was made with.");
    bind_slot_map(module);
}

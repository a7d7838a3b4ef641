// The host-side module (pybind11): the slot map of a state table, and what this build was made with.
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

// Any array-like of integers that fit int64, among them a tensor on the CPU; copied only where it is not contiguous
// int64 already.
Int64Array int64_array(const char* name, const py::object& values) {
    const py::array array(values);
    const bool empty = array.size() == 0;  // of any dtype: an empty list is float64
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

Batches over integer arrays [n] (numpy, or tensors on the CPU); every method is thread-safe, takes one lock a batch
(lookups share it) and lets go of the GIL. A row is read between `acquire` and `release`, and written between `reserve`
and `publish`: no row is ever written while somebody reads it, and no lookup finds a row before it is published.

Raises ValueError for arguments that do not fit; a call that raises has changed nothing.)")
        .def(py::init<int64_t>(), py::arg("capacity"), Released())
        .def("acquire", &slots_of<&SlotMap::acquire>, py::arg("ids"),
             "The row of each id, -1 where it has none. A row found is pinned, once for every time it is found: until "
             "its `release` nobody is given it.")
        .def("release", &change_slots<&SlotMap::release>, py::arg("slots"),
             "Unpins the rows that `acquire` gave; -1 is skipped.")
        .def("contains", &contains, py::arg("ids"), "Whether each id has a row, as bool [n]; neither pins nor counts.")
        .def("reserve", &slots_of<&SlotMap::reserve>, py::arg("ids"),
             "A row to write for each id, found by nobody before it is published; of an id given twice the last gets "
             "one and the others -1. Where no row is free, evicts unpinned users (CLOCK: those not looked up since the "
             "hand came by), those of `ids` last. RuntimeError where that does not suffice.")
        .def("publish", &change_slots<&SlotMap::publish>, py::arg("slots"),
             "From now on the ids that the rows were reserved for find them; the last row of an id counts; -1 "
             "is skipped. A row that an id had before is given out again when its last pin is gone.")
        .def("abandon", &change_slots<&SlotMap::abandon>, py::arg("slots"), "Gives reserved rows back; -1 is skipped.")
        .def("erase", &erase, py::arg("ids"), "Forgets the ids; returns how many there were.")
        .def("grow", &SlotMap::grow, py::arg("capacity"), Released(),
             "More rows; those there are keep their places, pins and users.")
        .def("ids", &ids, "The ids that have rows, int64 [len].")
        .def("stats", &stats, "Counts since the start: hits and misses of `acquire`, and evictions.")
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
    module.doc() = "Host-side structures of recattn.";
    module.def("build_info", &build_info, "The compiler and C++ standard that this build was made with.");
    bind_slot_map(module);
}

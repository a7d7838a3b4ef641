// The host-side module (pybind11): what this build was made with, for `python -m recattn info`.
#include <pybind11/pybind11.h>

#include <string>

namespace {

std::string compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "g++ " __VERSION__;
#else
    return "unknown compiler";
#endif
}

pybind11::dict build_info() {
    pybind11::dict info;
    info["compiler"] = compiler();
    info["cxx_standard"] = static_cast<long>(__cplusplus);
    return info;
}

}  // namespace

PYBIND11_MODULE(_host, module) {
    module.doc() = "Host-side structures of recattn.";
    module.def("build_info", &build_info, "The compiler and C++ standard that this build was made with.");
}

// Reading and digesting stored bytes, for Python: what the cache of packed weights is made of.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cerrno>
#include <system_error>

#include "bindings.hpp"
#include "stored.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace hasten {

namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Room = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

}  // namespace

void bind_stored(nb::module_& module) {
    module.def(
        "digest",
        [](Bytes data) {
            nb::gil_scoped_release unlocked;
            return digest(reinterpret_cast<const std::byte*>(data.data()), data.size());
        },
        "data"_a, "The sum, modulo 2**64, of the XXH64 of every 256 KiB of ``data``, each seeded with its number.");
    module.def(
        "will_need",
        [](Bytes data) {
            nb::gil_scoped_release unlocked;
            will_need(reinterpret_cast<const std::byte*>(data.data()), data.size());
        },
        "data"_a, "Let the system fetch a mapped array from disk ahead of who reads it.");
    module.def(
        "read_stored",
        [](ThreadPool& pool, int file, std::uint64_t offset, Room data) {
            try {
                nb::gil_scoped_release unlocked;
                return read_stored(pool, file, offset, reinterpret_cast<std::byte*>(data.data()), data.size());
            } catch (const std::system_error& error) {
                errno = error.code().value();
                PyErr_SetFromErrno(PyExc_OSError);
                throw nb::python_error();
            }
        },
        "pool"_a, "file"_a, "offset"_a, "data"_a,
        "Fill ``data`` from a file descriptor, every thread a run of its own, and return its digest. Raises OSError.");
}

}  // namespace hasten

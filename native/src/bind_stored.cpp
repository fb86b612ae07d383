// Reading and digesting stored bytes, for Python: what the cache of packed weights is made of.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "bindings.hpp"
#include "mapped.hpp"
#include "stored.hpp"
#include "tape.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace hasten {

namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Room = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

using Extents = std::vector<std::pair<std::size_t, std::size_t>>;

[[noreturn]] void raise(const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    throw nb::python_error();
}

std::vector<Extent> within(const MappedFile& file, const Extents& extents) {
    std::vector<Extent> checked;
    for (const auto& [offset, size] : extents) {
        if (offset > file.size() || size > file.size() - offset) throw nb::value_error("an extent reaches beyond the file");
        checked.push_back({offset, size});
    }
    return checked;
}

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
                raise(error);
            }
        },
        "pool"_a, "file"_a, "offset"_a, "data"_a,
        "Fill ``data`` from a file descriptor, every thread a run of its own, and return its digest. Raises OSError.");

    nb::class_<MappedFile>(module, "MappedFile",
                           "The first `size` bytes of a file descriptor, read where the system keeps them. Raises OSError.\n\n"
                           "An extent is (offset, size); ValueError is raised for one beyond the end.")
        .def("__init__",
             [](MappedFile* self, int file, std::size_t size) {
                 try {
                     new (self) MappedFile(file, size);
                 } catch (const std::system_error& error) {
                     raise(error);
                 }
             },
             "file"_a, "size"_a)
        .def_prop_ro("resident", &MappedFile::resident, "Whether all of it is in memory.")
        .def("digests",
             [](const MappedFile& self, ThreadPool& pool, const Extents& extents) {
                 const std::vector<Extent> checked = within(self, extents);
                 nb::gil_scoped_release unlocked;
                 return self.digests(pool, checked);
             },
             "pool"_a, "extents"_a, "The digest of each extent, by all threads together.")
        .def("move",
             [](MappedFile& self, const Extents& extents, std::vector<std::uint64_t> digests) {
                 if (extents.size() != digests.size()) throw nb::value_error("a digest for each extent is needed");
                 self.move(within(self, extents), std::move(digests));
             },
             "extents"_a, "digests"_a,
             "Begin to move it to huge pages of its own, in the background, and compare these digests with those of what was moved.")
        .def(
            "moved",
            [](MappedFile& self) {
                nb::gil_scoped_release unlocked;
                return self.moved();
            },
            "Wait for the end of the move, which rests no more; how many bytes lie in memory of their own.")
        .def_prop_ro("changed", &MappedFile::changed, "Whether a digest was another when it was moved: somebody changed the file.");

    nb::class_<TableBuffer>(module, "TableBuffer", "Rows of bf16 bits [rows, width] that are looked up: reserved, then filled.")
        .def(nb::init<std::size_t, std::size_t>(), "rows"_a, "width"_a)
        .def_prop_ro("part",
                     [](nb::handle self) {
                         const std::span<std::byte> part = nb::cast<TableBuffer&>(self).part();
                         return nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>(part.data(), {part.size()}, self);
                     },
                     nb::sig("def part(self) -> object"), "Its memory, as a view.")
        .def("lie_in", [](TableBuffer& self, std::shared_ptr<MappedFile> file, std::size_t offset) { self.lie_in(std::move(file), offset); },
             "file"_a, "offset"_a, "Take the rows from a file instead. Raises ValueError where it does not hold them.");
}

}  // namespace hasten

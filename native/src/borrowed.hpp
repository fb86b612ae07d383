// An array of Python's for the length of a call, through the buffer protocol: a step takes five, and nothing else is as quick.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

namespace hasten {

class BorrowedArray {
   public:
    // Throws TypeError for anything but a C-contiguous array of `dimensions` of that type of struct's ('i', 'f').
    BorrowedArray(const char* name, nanobind::handle array, char type, int dimensions, bool writable = false) {
        const int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
        if (PyObject_GetBuffer(array.ptr(), &view_, flags) == 0) {
            if (view_.ndim == dimensions && view_.format && view_.format[0] == type && !view_.format[1]) return;
            PyBuffer_Release(&view_);
        } else {
            PyErr_Clear();
        }
        const std::string what = std::string(name) + " must be a C-contiguous" + (writable ? ", writable" : "") + " array of " +
                                 (type == 'f' ? "float32" : "int32") + " of " + std::to_string(dimensions) + " dimensions";
        throw nanobind::type_error(what.c_str());
    }
    ~BorrowedArray() { PyBuffer_Release(&view_); }  // with the interpreter lock, which callers take back before they leave
    BorrowedArray(const BorrowedArray&) = delete;
    BorrowedArray& operator=(const BorrowedArray&) = delete;

    std::size_t extent(int dimension) const { return static_cast<std::size_t>(view_.shape[dimension]); }
    template <class T>
    T* data() const {
        return static_cast<T*>(view_.buf);
    }

   private:
    Py_buffer view_;
};

}  // namespace hasten

// Pages: what sequences keep between steps, each page one run of bytes that can be copied as it is.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "memory.hpp"

namespace hasten {

// The pages of one state group. Memory is reserved for all and taken as they are touched.
class Pages {
   public:
    Pages(int pages, std::size_t page_bytes)
        : pages_(pages), page_bytes_(page_bytes), memory_(std::max<std::size_t>(page_bytes * static_cast<std::size_t>(pages), 1)) {}

    int pages() const { return pages_; }
    std::size_t page_bytes() const { return page_bytes_; }

    // All layers of one page over those of another; both must be among them.
    void copy_page(int from, int to) { std::memmove(page_memory(to), page_memory(from), page_bytes_); }

    // The bytes of a page, which must be among them: page_bytes() of them.
    std::uint8_t* page_memory(int page) const {
        return reinterpret_cast<std::uint8_t*>(memory_.data()) + page_bytes_ * static_cast<std::size_t>(page);
    }

   private:
    int pages_;
    std::size_t page_bytes_;
    Buffer memory_;
};

// Recurrent states: a page is all that one sequence keeps, layer by layer, `size` float32 numbers each. How they lie is the kernels' business.
class StatePool : public Pages {
   public:
    StatePool(int layers, int pages, std::size_t size) : Pages(pages, static_cast<std::size_t>(layers) * size * sizeof(float)), layers_(layers), size_(size) {}

    int layers() const { return layers_; }
    std::size_t size() const { return size_; }
    float* state(int page, int layer) const { return reinterpret_cast<float*>(page_memory(page)) + static_cast<std::size_t>(layer) * size_; }

   private:
    int layers_;
    std::size_t size_;
};

}  // namespace hasten

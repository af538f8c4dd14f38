// An array whose size is known when it is made. The functions of std::vector<int64_t> would be shared by the code of
// all instruction sets, and the linker could keep those of one that the machine lacks; these belong to one set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qlora::QLORA_ISA {

template <class T>
class Array {
  public:
    explicit Array(int64_t size) : data_(new T[static_cast<size_t>(size)]), size_(size) {}
    ~Array() { delete[] data_; }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;

    T& operator[](int64_t i) { return data_[i]; }
    const T& operator[](int64_t i) const { return data_[i]; }
    T* data() { return data_; }
    const T* begin() const { return data_; }
    const T* end() const { return data_ + size_; }

  private:
    T* data_;
    int64_t size_;
};

}  // namespace qlora::QLORA_ISA

// The host part of a stand-alone .cu file: arrays that CPU and GPU both see, and what a kernel
// should have left in them. The file is an ordinary CUDA program; `python -m kernels check` runs it
// on the CPU, `nvcc -I kernels FILE.cu` makes it a program for a GPU.
#pragma once
#include <cstdio>
#include <cstdlib>

#include "common.cuh"

// `count` elements of global memory. Without `of` they are unwritten; with it element i is of(i).
// The name is for reports. Pass the array itself to a kernel: it converts to T*.
template <typename T> struct Array {
    const char* name;
    int64_t count;
    T* data = nullptr;

    Array(const char* name, int64_t count) : name(name), count(count) {
        cudaMallocManaged(&data, count * sizeof(T));
        WATCH(add_memory(data, count * sizeof(T), name, sizeof(T)));
    }
    template <typename Of> Array(const char* name, int64_t count, Of of) : Array(name, count) {
        for (int64_t i = 0; i < count; i++) data[i] = of(i);
    }
    Array(const Array&) = delete;
    ~Array() { cudaFree(data); }
    operator T*() const { return data; }
};

// What the header of a kernel's file says that its launches so far move: bytes of global memory
// read and written. `python -m kernels profile` prints it beside what was counted.
inline void formula(const char* kernel, double bytes_read, double bytes_written) {
    WATCH(add_formula(kernel, bytes_read, bytes_written));
}

#ifndef __CUDACC__
template <typename T> T* argument(const Array<T>& array) { return array.data; }  // of a launch
#endif

inline int blocks_of(int64_t count, int size) { return int((count + size - 1) / size); }

// Argument k of the program as a number, `otherwise` where it is not given.
inline int argument(int argc, char** argv, int k, int otherwise) {
    return k < argc ? atoi(argv[k]) : otherwise;
}

// A number in [-1, 1) for each i, always the same.
inline float noise(uint64_t i) {
    i = (i + 1) * 0x9e3779b97f4a7c15;
    i = (i ^ i >> 32) * 0xd6e8feb86659fd93;
    return int32_t(i >> 32) * 0x1p-31f;
}

// Whether element i is of(i), within `tolerance`, for all i; says which is the first that is not.
template <typename T, typename Of>
bool expect(const Array<T>& got, Of of, double tolerance = 0) {
    cudaDeviceSynchronize();
    int64_t wrong = 0, first = 0;
    for (int64_t i = got.count - 1; i >= 0; i--) {
        double off = std::abs(double(got.data[i]) - double(of(i)));
        if (!(off <= tolerance)) wrong++, first = i;
    }
    if (wrong)
        printf("wrong: %s[%lld] is %.9g, wanted %.9g; %lld of %lld elements are wrong\n", got.name,
               (long long)first, double(got.data[first]), double(of(first)), (long long)wrong,
               (long long)got.count);
    return !wrong;
}

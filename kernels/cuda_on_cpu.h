// Runs a CUDA kernel's source on the CPU, so that it can be read, changed and tested without a GPU.
//
// g++ compiles the unmodified .cu against this header. Each thread of a block is a fibre
// (ucontext): it runs until it meets a barrier or a warp operation, then the next one runs; a warp
// runs as far as it can. Blocks spread over the CPU's cores. The variable CUDA_ON_CPU_ORDER =
// forward | reverse | random:SEED is the order in which fibres resume: a missing barrier that hides
// in one order shows in another.
//
// Refused with a std::runtime_error that names kernel, block and thread:
//   * threads of a block that wait at different barriers;
//   * a warp operation whose mask names a lane that has exited, does not exist or never comes, or
//     leaves out the caller; a shuffle from a lane outside the mask;
//   * more threads or shared memory than a GPU gives a block.
// In the other orders than `forward` the blocks run from the last to the first.
// Shared memory starts as NaN. A cp.async copies as late as it may in the order `forward`, at once
// in `reverse`, by chance in `random`, for the hardware may do either. Counted are launches, the
// bytes that load_global, store_global and cp_async_16 move, and the bank conflicts of ldmatrix.
// Accesses outside a tensor are AddressSanitizer's to find, or watch.h's, and so are races and
// other bank conflicts. Not shown: PTX encodings, occupancy, the memory model. The functions of
// CUDA are in cuda_words.h.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

// ---------------------------------------- words of the language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define threadIdx (cuda_on_cpu::self->index)
#define blockIdx (cuda_on_cpu::self->block->index)
#define blockDim (cuda_on_cpu::self->block->dim)
#define gridDim (cuda_on_cpu::self->block->grid)

// The two forms C++ cannot parse; under nvcc they are kernel<<<...>>>(...) and extern __shared__.
#define LAUNCH(kernel, grid, block, smem, stream, ...)                                        \
    cuda_on_cpu::launch_with(#kernel, grid, block, smem, cuda_on_cpu::arguments(__VA_ARGS__), \
                             [&](auto... arguments) {                                         \
                                 cuda_on_cpu::self->quiet = 0;                                \
                                 kernel(arguments...);                                        \
                                 cuda_on_cpu::self->quiet = 1;                                \
                             })
#define DYN_SMEM(type, name) \
    type* name = reinterpret_cast<type*>(cuda_on_cpu::self->block->shared.get())

#define CUDA_ON_CPU_SITE __FILE__ ":" CUDA_ON_CPU_TEXT(__LINE__)
#define CUDA_ON_CPU_TEXT(line) CUDA_ON_CPU_TEXT_(line)
#define CUDA_ON_CPU_TEXT_(line) #line

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    unsigned count() const { return x * y * z; }
    dim3 at(unsigned i) const { return dim3(i % x, i / x % y, i / x / y); }  // the i-th of them
};
using cudaStream_t = void*;

// ---------------------------------------- fibres, blocks, launches

namespace cuda_on_cpu {

constexpr unsigned MAX_THREADS = 1024, MAX_RESUMES = 1000000;
constexpr size_t MAX_SHARED = 99 * 1024;  // bytes a block may ask for on every GPU since sm_80
constexpr size_t STACK = 256 * 1024;

struct Block;
struct Copy;
struct Fibre;
enum Mode { READ, WRITE, ATOMIC };

// watch.py compiles with CUDA_ON_CPU_WATCH: then watch.h is told of what follows. Else WATCH() is
// nothing.
#ifdef CUDA_ON_CPU_WATCH
namespace watch {
void launch_begins(const char* kernel);
void launch_ends();
void block_begins(const Block& block);
void barrier_opens();
void warp_synced(unsigned first_rank, unsigned mask);
void fence();
void changed();
void access(uintptr_t at, size_t bytes, Mode mode, uint32_t pc);
void copy_begins(const Copy& copy, uint32_t pc);
void copy_ends(const Copy& copy);
void matrix_read(const void* row, uint32_t pc);
void refused(const Fibre* fibre, const std::string& why);
void add_memory(const void* at, size_t bytes, const char* name, unsigned element);
void free_memory(const void* at);
void add_formula(const char* kernel, double read, double written);
}  // namespace watch
#define WATCH(...) cuda_on_cpu::watch::__VA_ARGS__
#else
#define WATCH(...) void()
#endif
#define CUDA_ON_CPU_PC uint32_t(reinterpret_cast<uintptr_t>(__builtin_return_address(0)))

struct Copy {  // a cp.async: `valid` bytes, then zeros up to 16
    void* to;
    const void* from;
    int valid, group;
    bool made = false;
    void make() {
        if (made) return;
        made = true;
        memcpy(to, from, valid);
        memset(static_cast<char*>(to) + valid, 0, 16 - valid);
    }
};

struct Block;
struct Fibre {
    enum State { READY, AT_BARRIER, IN_WARP_OP, EXITED } state = READY;
    Block* block;
    dim3 index;
    unsigned rank;               // x fastest, then y, then z: 32 in a row are a warp
    const char* site = "";       // file:line where it waits
    unsigned mask = 0;           // of the warp operation it waits in,
    const void* mine = nullptr;  // what it brings there
    void* all = nullptr;         // and where it wants everyone's
    std::vector<Copy> copies;
    int group = 0;               // cp.async groups committed so far
    unsigned resumes = 0;
    int vote = 0;
    int quiet = 0;               // inside the emulator: not to be watched
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
};

struct Block {
    const char* kernel;
    enum Order { FORWARD, REVERSE, RANDOM } order;
    dim3 grid, dim, index;
    const std::function<void()>* body;
    std::unique_ptr<char[]> shared;
    size_t shared_bytes;
    std::vector<Fibre> fibres;
    ucontext_t scheduler{};
    std::string error{};
    long long read = 0, written = 0;  // bytes of global memory
    long long conflicts = 0;          // of ldmatrix, in further passes over the banks
    std::mt19937 random{};
};

inline thread_local Fibre* self = nullptr;

struct Quiet {  // what a thread does in its lifetime is the emulator's
    Quiet() { if (self) self->quiet++; }
    ~Quiet() { if (self) self->quiet--; }
};

// Counted since they were set to 0.
inline std::atomic<long long> bytes_read{0}, bytes_written{0}, bank_conflicts{0}, launches{0};

inline std::string name(dim3 i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) +
           ")";
}

inline std::runtime_error refusal(const Fibre& fibre, const std::string& why) {
    WATCH(refused(&fibre, why));
    return std::runtime_error(std::string("kernel ") + fibre.block->kernel + ", block " +
                              name(fibre.block->index) + ", thread " + name(fibre.index) + ": " +
                              why);
}

inline void yield() { swapcontext(&self->context, &self->block->scheduler); }

[[noreturn]] inline void refuse(const std::string& why) {
    self->quiet++;
    self->block->error = refusal(*self, why).what();
    for (;;) yield();  // the scheduler throws and never resumes this fibre
}

inline void barrier(const char* site) {
    self->state = Fibre::AT_BARRIER, self->site = site;
    yield();
}

// The one warp operation, of which all others are made: each lane of `mask` brings `bytes` bytes
// and gets those of all 32 lanes, in order. The last lane to come hands out.
inline void exchange(const char* site, unsigned mask, const void* mine, void* all, size_t bytes) {
    Block& block = *self->block;
    unsigned lane = self->rank % 32, warp = self->rank - lane, missing = 0;
    auto refuse_it = [&](const std::string& why) {
        refuse(std::string("the warp operation at ") + site + why);
    };
    if (!(mask >> lane & 1)) refuse_it(" leaves the caller out of its mask");
    self->state = Fibre::IN_WARP_OP, self->site = site;
    self->mask = mask, self->mine = mine, self->all = all;
    for (unsigned i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        if (warp + i >= block.fibres.size())
            refuse_it(" names lane " + std::to_string(i) + ", which does not exist");
        Fibre& other = block.fibres[warp + i];
        if (other.state == Fibre::EXITED)
            refuse_it(" names lane " + std::to_string(i) + ", which has exited");
        bool here = other.state == Fibre::IN_WARP_OP && !strcmp(other.site, site);
        missing += !here || other.mask != mask;
    }
    if (missing) return yield();
    if (!bytes) WATCH(warp_synced(warp, mask));
    for (unsigned to = 0; to < 32; to++) {
        if (!(mask >> to & 1)) continue;
        for (unsigned from = 0; from < 32; from++)
            if (mask >> from & 1)
                memcpy(static_cast<char*>(block.fibres[warp + to].all) + from * bytes,
                       block.fibres[warp + from].mine, bytes);
        block.fibres[warp + to].state = Fibre::READY;
    }
}

// cp.async may copy at any time up to its wait: now, or when its group is waited for.
[[gnu::noinline]] inline void copy(Copy copy) {
    WATCH(copy_begins(copy, CUDA_ON_CPU_PC));
    Quiet quiet;
    Block& block = *self->block;
    block.read += copy.valid;
    if (block.order == Block::REVERSE || (block.order == Block::RANDOM && block.random() % 2))
        copy.make();
    copy.group = self->group;
    self->copies.push_back(copy);
}

// Wait until at most `pending` of the groups committed by this thread are under way.
inline void copy_wait(int pending) {
    Quiet quiet;
    std::vector<Copy> later;
    for (Copy& copy : self->copies) {
        if (copy.group >= self->group - pending) {
            later.push_back(copy);
            continue;
        }
        copy.make();
        WATCH(copy_ends(copy));
    }
    self->copies = later;
}

template <typename T> T shuffle(const char* site, unsigned mask, T value, unsigned from) {
    T all[32];
    if (!(mask >> from % 32 & 1))
        refuse(std::string("the shuffle at ") + site + " reads lane " + std::to_string(from % 32) +
               ", which is outside its mask");
    exchange(site, mask, &value, all, sizeof(T));
    return all[from % 32];
}

// An ldmatrix: each lane brings the address of a row of 16 bytes and gets all 32. Each of the four
// matrices, eight rows, is read in one pass if its rows lie in different banks.
[[gnu::noinline]] inline void matrix_rows(const char* site, const void* row,
                                          const uint16_t* (&rows)[32]) {
    WATCH(matrix_read(row, CUDA_ON_CPU_PC));
    exchange(site, ~0u, &row, rows, sizeof(row));
    for (int matrix = 0; matrix < 4 && self->rank % 32 == 0; matrix++) {
        int lines[8] = {}, most = 0;  // rows in each eighth of the banks
        for (int i = 0; i < 8; i++) {
            int& line = lines[reinterpret_cast<uintptr_t>(rows[8 * matrix + i]) / 16 % 8];
            most = std::max(most, ++line);
        }
        self->block->conflicts += most - 1;
    }
}

inline void run_fibre() {
    (*self->block->body)();
    self->state = Fibre::EXITED;
    yield();
}

// No fibre can run: opens the barrier if all that are left wait at the same one.
inline void open_barrier(Block& block) {
    Fibre* first = nullptr;
    for (Fibre& fibre : block.fibres) {
        if (fibre.state == Fibre::EXITED) continue;
        if (fibre.state == Fibre::IN_WARP_OP)
            throw refusal(fibre, std::string("waits in the warp operation at ") + fibre.site +
                                     " for lanes that never come");
        if (!first) first = &fibre;
        if (strcmp(first->site, fibre.site))
            throw refusal(fibre, std::string("waits at the barrier ") + fibre.site +
                                     ", but thread " + name(first->index) + " at " + first->site);
        fibre.state = Fibre::READY;
    }
    WATCH(barrier_opens());
}

// No lane of the warp can go on: those that ask together which lanes are active get their answer.
inline unsigned converge(Block& block, unsigned warp) {
    unsigned mask = 0;
    const char* site = nullptr;
    auto asks = [&](unsigned i) {
        if (warp + i >= block.fibres.size()) return false;
        Fibre& fibre = block.fibres[warp + i];
        return fibre.state == Fibre::IN_WARP_OP && !fibre.mask && (!site || fibre.site == site);
    };
    for (unsigned i = 0; i < 32; i++)
        if (asks(i)) mask |= 1u << i, site = block.fibres[warp + i].site;
    for (unsigned i = 0; i < 32; i++)
        if (mask >> i & 1) {
            *static_cast<unsigned*>(block.fibres[warp + i].all) = mask;
            block.fibres[warp + i].state = Fibre::READY;
        }
    return __builtin_popcount(mask);
}

// Resume each lane of a warp that can go on, once; returns how many there were.
inline unsigned run_lanes(Block& block, unsigned warp, const std::vector<unsigned>& lanes,
                          unsigned& left) {
    unsigned resumed = 0;
    for (unsigned lane : lanes) {
        if (warp + lane >= block.fibres.size()) continue;
        self = &block.fibres[warp + lane];
        if (self->state != Fibre::READY) continue;
        if (++self->resumes > MAX_RESUMES)
            throw refusal(*self, std::string("it never ends; it has waited a million times, last "
                                             "at ") + self->site);
        swapcontext(&block.scheduler, &self->context);
        if (!block.error.empty()) throw std::runtime_error(block.error);
        left -= self->state == Fibre::EXITED;
        resumed++;
    }
    return resumed ? resumed : converge(block, warp);
}

// A warp runs as far as it can before the next starts: they drift as far as the barriers allow.
inline void run_block(Block& block) {
    unsigned left = block.dim.count();
    memset(block.shared.get(), 0xff, block.shared_bytes);  // NaN in every floating type
    WATCH(block_begins(block));
    for (unsigned i = 0; i < left; i++) {
        Fibre& fibre = block.fibres[i];
        fibre.block = &block, fibre.rank = i, fibre.state = Fibre::READY;
        fibre.index = block.dim.at(i);
        fibre.copies.clear(), fibre.group = fibre.resumes = 0, fibre.quiet = 1;
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.get();
        fibre.context.uc_stack.ss_size = STACK;
        makecontext(&fibre.context, run_fibre, 0);
    }
    std::vector<unsigned> warps((left + 31) / 32), lanes(32);
    std::iota(warps.begin(), warps.end(), 0);
    std::iota(lanes.begin(), lanes.end(), 0);
    if (block.order == Block::REVERSE) {
        std::reverse(warps.begin(), warps.end());
        std::reverse(lanes.begin(), lanes.end());
    }
    while (left) {
        bool ran = false;
        if (block.order == Block::RANDOM) std::shuffle(warps.begin(), warps.end(), block.random);
        for (unsigned warp : warps) {
            if (block.order == Block::RANDOM)
                std::shuffle(lanes.begin(), lanes.end(), block.random);
            while (unsigned resumed = run_lanes(block, 32 * warp, lanes, left)) ran |= resumed > 0;
        }
        if (!ran) open_barrier(block);
    }
    self = nullptr;
    WATCH(barrier_opens());
}

// How many multiprocessors the GPU is said to have.
inline int multiprocessors() {
    const char* variable = getenv("CUDA_ON_CPU_MULTIPROCESSORS");
    return variable ? atoi(variable) : 6;
}

inline void launch(const char* kernel, dim3 grid, dim3 dim, size_t smem,
                   const std::function<void()>& body) {
    launches++;
    if (!grid.count() || !dim.count() || dim.count() > MAX_THREADS || smem > MAX_SHARED) {
        std::string why = std::string("kernel ") + kernel + ", grid " + name(grid) + ", block " +
                          name(dim) + ", " + std::to_string(smem) +
                          " bytes of shared memory: a block has 1 to " +
                          std::to_string(MAX_THREADS) + " threads and at most " +
                          std::to_string(MAX_SHARED) + " bytes";
        WATCH(refused(nullptr, why));
        throw std::runtime_error(why);
    }
    const char* variable = getenv("CUDA_ON_CPU_ORDER");
    std::string text = variable ? variable : "forward";
    bool random = text.rfind("random:", 0) == 0;
    if (!random && text != "forward" && text != "reverse")
        throw std::runtime_error("CUDA_ON_CPU_ORDER is " + text +
                                 "; wanted forward, reverse or random:SEED");
    unsigned seed = random ? atoi(text.c_str() + strlen("random:")) : 0;
    auto order = random ? Block::RANDOM : text == "reverse" ? Block::REVERSE : Block::FORWARD;
    std::atomic<unsigned> next{0};
    std::mutex mutex;
    std::exception_ptr failure;
    auto work = [&] {
        std::unique_ptr<char[]> shared(new char[smem]);
        Block block{kernel, order, grid, dim, dim3(), &body, std::move(shared), smem,
                    std::vector<Fibre>(dim.count())};
        try {
            for (unsigned n; (n = next++) < grid.count();) {
                unsigned i = order == Block::FORWARD ? n : grid.count() - 1 - n;
                block.index = grid.at(i);
                block.random.seed(seed + i);
                run_block(block);
            }
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex);
            failure = std::current_exception();
            next = grid.count();
        }
        bytes_read += block.read, bytes_written += block.written;
        bank_conflicts += block.conflicts;
    };
    std::vector<std::thread> workers;
#ifndef CUDA_ON_CPU_WATCH  // which is for one
    for (unsigned i = 1; i < std::min(grid.count(), std::thread::hardware_concurrency()); i++)
        workers.emplace_back(work);
#endif
    work();
    for (std::thread& worker : workers) worker.join();
    if (failure) std::rethrow_exception(failure);
}

// The arguments of a launch, evaluated once, as on a GPU. An Array is passed by its address.
template <typename T> std::decay_t<T> argument(const T& value) { return (std::decay_t<T>)value; }
template <typename... T> auto arguments(const T&... values) {
    return std::make_tuple(argument(values)...);
}
template <typename Arguments, typename Kernel>
void launch_with(const char* kernel, dim3 grid, dim3 dim, size_t smem, const Arguments& arguments,
                 Kernel call) {
    WATCH(launch_begins(kernel));
    launch(kernel, grid, dim, smem, [&] { std::apply(call, arguments); });
    WATCH(launch_ends());
}

}  // namespace cuda_on_cpu

#include "cuda_words.h"

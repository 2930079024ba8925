// How watch.h and profile.h come to know of a program: g++'s calls at each load and store, the
// emulator's at launches and blocks, and signals. The one file of the watch that is compiled.
#include <signal.h>
#include <sys/time.h>

#include <fstream>

#include "watch.h"

namespace cuda_on_cpu::watch {

// A signal: the program crashed, or one block has run for too long.
void on_signal(int signal, siginfo_t* info, void* context) {
    uint32_t pc = last_pc;
    auto* of = static_cast<ucontext_t*>(context);
#if defined(__x86_64__)
    pc = of->uc_mcontext.gregs[REG_RIP] + 1;
#elif defined(__aarch64__)
    pc = of->uc_mcontext.pc + 4;
#endif
    Access last;
    last.pc = last_pc, last.rank = self ? self->rank : 0, last.block = number;
    if (signal == SIGPROF)
        fault("hang", pc, "one block has run for " + text(seconds) + " s, and last waited at " +
                              (self && *self->site ? self->site : "nothing"), &last);
    else
        fault("crash", pc, signal == SIGFPE ? "division of an integer by zero"
                                            : "access to the address " +
                                                  text(double(Address(info->si_addr))), &last);
    stop();
}

// ---------------------------------------- launches and blocks

// What watch.py found in the program's symbols: __shared__ arrays, __device__ variables.
void add_variables() {
    std::ifstream file(getenv("CUDA_WATCH_VARIABLES"));
    std::string kind, name;
    Address at, bytes, base = 0;
    while (file >> kind >> std::hex >> at >> bytes && std::getline(file >> std::ws, name)) {
        bool is_shared = kind == "shared";  // these are offsets in the thread's own memory
        if (kind == "self")
            base = Address(&self) - at;
        else
            add(reinterpret_cast<void*>(base * is_shared + at), bytes, name, 0, is_shared, HOST);
    }
}

void on_time() {  // SIGPROF so many seconds of the CPU's from now
    itimerval left{};
    left.it_value.tv_sec = seconds;
    setitimer(ITIMER_PROF, &left, nullptr);
}

// What the host wrote by memcpy and the like, which g++ does not tell us of: what is not as
// cudaMalloc left it.
void find_written(Memory& memory) {
    auto* bytes = reinterpret_cast<const unsigned char*>(memory.begin);
    for (size_t i = 0; i < memory.bytes; i++) {
        Access& write = memory.cells[i / memory.unit].write;
        if (write.block == NOBODY && bytes[i] != 0xff) write.block = HOST;
    }
}

void launch_begins(const char* name) {
    kernel = name, first = number + 1;
    for (Memory& memory : memories)
        if (!memory.is_shared && !memory.freed) find_written(memory);
    indices.clear(), released.clear();
    if (!instrumented) fault("not instrumented", 0, ""), stop();
}

void launch_ends() {
    auto& of = totals[kernel];
    of[0]++;
    for (Site* site : used_sites)
        for (int is_shared : {0, 1}) {
            Totals& mine = site->totals[is_shared];
            if (!mine[0]) continue;
            Totals& to = lines[{site->pc, is_shared, site->mode, kernel}];
            for (size_t i = 0; i < mine.size(); i++) to[i] += mine[i];
            if (!is_shared && site->mode != WRITE) of[1] += mine[2];
            if (!is_shared && site->mode != READ) of[2] += mine[2];
            mine = Totals();
        }
    used_sites.clear();
    free_memory(dynamic);
    dynamic = nullptr;
    on_time();
}

void block_begins(const Block& now) {
    block = &now, number++, epoch = 1, spins = busy = 0;
    indices.push_back(now.index);
    clocks.assign((now.dim.count() + 31) / 32 * 32 * 32, 0), fenced.assign(now.dim.count(), 0);
    for (unsigned rank = 0; rank < now.dim.count(); rank++) clocks[rank * 32 + rank % 32] = 1;
    known.clear(), acquired.clear();
    if (now.shared_bytes && !dynamic)
        add(dynamic = now.shared.get(), now.shared_bytes, "shared memory", 0, true, HOST);
    for (auto [begin, memory] : by_address)
        if (memory->is_shared && begin != Address(dynamic))
            memset(reinterpret_cast<void*>(begin), 0xff, memory->bytes);
    on_time();
}

void add_formula(const char* kernel, double read, double written) {
    say(std::string("formula\t") + kernel + "\t" + text(read) + "\t" + text(written) + "\n");
}

// Before main().
struct Start {
    Start() {
        static char stack[65536];
        stack_t other{};
        other.ss_sp = stack, other.ss_size = sizeof(stack);
        sigaltstack(&other, nullptr);
        struct sigaction action{};
        action.sa_sigaction = on_signal, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGPROF})
            sigaction(signal, &action, nullptr);
        counting = getenv("CUDA_WATCH_COUNT");
        if (const char* limit = getenv("CUDA_WATCH_SECONDS")) seconds = atoi(limit);
        atexit(flush);
        add_variables();
    }
} start;

}  // namespace cuda_on_cpu::watch

// ---------------------------------------- what g++ calls

using cuda_on_cpu::Mode;
#define PC CUDA_ON_CPU_PC
namespace {
template <unsigned alignment = 1>
void touch(const void* at, size_t bytes, Mode mode, uint32_t pc) {
    cuda_on_cpu::watch::access(uintptr_t(at), bytes, mode, pc);
    if (uintptr_t(at) % alignment) cuda_on_cpu::watch::misaligned(uintptr_t(at), alignment, pc);
}
}
extern "C" {
#define ACCESS(n)                                                                             \
    void __tsan_read##n(void* at) { touch<n>(at, n, cuda_on_cpu::READ, PC); }                 \
    void __tsan_write##n(void* at) { touch<n>(at, n, cuda_on_cpu::WRITE, PC); }               \
    void __tsan_unaligned_read##n(void* at) { touch(at, n, cuda_on_cpu::READ, PC); }          \
    void __tsan_unaligned_write##n(void* at) { touch(at, n, cuda_on_cpu::WRITE, PC); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
void __tsan_read_range(void* at, size_t bytes) { touch(at, bytes, cuda_on_cpu::READ, PC); }
void __tsan_write_range(void* at, size_t bytes) { touch(at, bytes, cuda_on_cpu::WRITE, PC); }
void __tsan_init() { cuda_on_cpu::watch::instrumented = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_atomic_thread_fence(int) {}

// std::atomic, which is the emulator's.
#define ATOMIC(bits)                                                                          \
    int##bits##_t __tsan_atomic##bits##_load(const volatile int##bits##_t* at, int) {         \
        return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                         \
    }                                                                                         \
    void __tsan_atomic##bits##_store(volatile int##bits##_t* at, int##bits##_t x, int) {      \
        __atomic_store_n(at, x, __ATOMIC_SEQ_CST);                                            \
    }                                                                                         \
    int##bits##_t __tsan_atomic##bits##_exchange(volatile int##bits##_t* at, int##bits##_t x, \
                                                 int) {                                       \
        return __atomic_exchange_n(at, x, __ATOMIC_SEQ_CST);                                  \
    }                                                                                         \
    int##bits##_t __tsan_atomic##bits##_fetch_add(volatile int##bits##_t* at,                 \
                                                  int##bits##_t x, int) {                     \
        return __atomic_fetch_add(at, x, __ATOMIC_SEQ_CST);                                   \
    }                                                                                         \
    int##bits##_t __tsan_atomic##bits##_fetch_sub(volatile int##bits##_t* at,                 \
                                                  int##bits##_t x, int) {                     \
        return __atomic_fetch_sub(at, x, __ATOMIC_SEQ_CST);                                   \
    }
ATOMIC(8) ATOMIC(16) ATOMIC(32) ATOMIC(64)

struct Index {  // of an array, as g++ describes it
    const char* file;
    uint32_t line, column;
    struct { uint16_t kind, info; char name[1]; } *array;
};
void __ubsan_handle_out_of_bounds(Index* of, uintptr_t index) {
    cuda_on_cpu::watch::fault("index outside", PC, std::to_string(intptr_t(index)) + " of " +
                                                       of->array->name);
    cuda_on_cpu::watch::stop();
}
}

// A sanitizer for kernels that run on the CPU: what is wrong with a load or store. profile.h counts
// them. watch_calls.h calls both; watch.py compiles it and links it with the file that it watches.
//
// g++ -fsanitize=thread inserts a call of __tsan_read4(address) and the like at every load and
// store of the kernel. These functions are ours, in place of its runtime's. Each word of shared and
// global memory has a `Cell`, which remembers who wrote it and who read it last. Two accesses of
// different threads, one of them a write and not both atomic, are a race unless one happens before
// the other: because a barrier lies between them, a __syncwarp that both threads take part in, or,
// across blocks, a fence, an atomic operation on the same address in both, and a fence. So a race
// is found in whatever order the threads run. A shuffle orders nothing: CUDA promises no more.
// Blocks run one after another here. A block that publishes what a third one published to it
// (a chain of fences) is not followed; nor is volatile, which orders nothing.
//
// What is found goes to the file $CUDA_WATCH, one line each, fields apart by tabs:
//   fault kind kernel pc other_pc who other_who text      line pc space op kernel and five counts
//   kernel name launches bytes_read bytes_written         formula kernel bytes_read bytes_written
#pragma once
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <deque>
#include <set>

#include "profile.h"

extern "C" char end;

namespace cuda_on_cpu::watch {

using Address = uintptr_t;
constexpr unsigned NOBODY = 0, HOST = 1, PENDING = (1 << 21) - 1;
constexpr unsigned SPIN = 20000, SPINS = 1000;  // see spin()

struct Access {                      // by whom, when, and where in the program
    uint32_t block = NOBODY, pc = 0;  // blocks are numbered through all launches
    uint32_t clock = 0;              // of the thread: one more after each __syncwarp
    uint32_t rank : 10, atomic : 1, epoch : 21;  // epoch: barriers that the block has passed
};

// shared: the last readers, or the last that used it by atomic operations: the latest, the latest
// other one of the same warp, and the latest of another warp. If any thread's access races with a
// write, one of these three does.
struct Cell {
    Access write, shared[3];
};

struct Memory {  // an array, or the shared memory of a block
    Address begin;
    size_t bytes;
    std::string name;
    unsigned element;  // bytes of one; 0: not known
    bool is_shared, freed = false;
    unsigned unit = 4;  // bytes of a cell: as few as any access has had
    std::vector<Cell> cells{};
};

struct Known {  // what another block did before `epoch`, known to all here once `seen` is past
    uint32_t block, rank, clock, epoch, by, seen;
};

std::deque<Memory> memories;  // an address stays: sites point into it
std::map<Address, Memory*> by_address;
const char* kernel = "";
const Block* block = nullptr;
uint32_t number = HOST, first = HOST + 1, epoch = 1;  // of this block; of the launch's first one
std::vector<dim3> indices;                            // of the launch's blocks
std::vector<uint32_t> clocks;                         // [rank][lane]: of the warp, as rank knows it
std::vector<uint32_t> fenced;                         // [rank]: the epoch of its last fence
std::map<uint32_t, std::vector<Known>> known;
std::vector<Known> acquired;
std::map<Address, std::vector<Known>> released;
const void* dynamic = nullptr;                        // the launch's shared memory
int seconds = 5;                                      // of the CPU's that a block may take
bool instrumented = false, counting = false;
unsigned busy = 0, spins = 0;
const Fibre* last_thread = nullptr;
uint32_t last_pc = 0;
std::map<std::string, std::array<double, 3>> totals;  // launches, bytes read, written

// ---------------------------------------- reports

void say(const std::string& line) {
    static int file = open(getenv("CUDA_WATCH") ? getenv("CUDA_WATCH") : "/dev/stderr",
                           O_WRONLY | O_CREAT | O_APPEND, 0644);
    if (write(file, line.data(), line.size()) < 0) _exit(9);
}

std::string text(double x) { return std::to_string((long long)x); }

void flush() {
    static bool done = false;
    if (done) return;
    done = true;
    for (auto& [name, of] : totals)
        say("kernel\t" + name + "\t" + text(of[0]) + "\t" + text(of[1]) + "\t" + text(of[2]) +
            "\n");
    for (auto& [key, of] : lines) {
        auto& [pc, is_shared, mode, name] = key;
        const char* op = mode == READ ? "read\t" : mode == WRITE ? "write\t" : "atomic\t";
        std::string line =
            "line\t" + text(pc) + (is_shared ? "\tshared\t" : "\tglobal\t") + op + name;
        for (double x : of) line += "\t" + text(x);
        say(line + "\n");
    }
}

[[noreturn]] void stop() {
    flush();
    fflush(stdout);
    _exit(1);
}

std::string who(uint32_t number, unsigned rank) {
    if (number < first) return "main()";
    return "block " + name(indices[number - first]) + ", thread " + name(block->dim.at(rank));
}

// One line for each kind of fault at a pair of places in the program, the first time.
void fault(const char* kind, uint32_t pc, const std::string& text, const Access* other = nullptr) {
    static std::set<std::tuple<std::string, uint32_t, uint32_t>> known;
    uint32_t other_pc = other ? other->pc : 0;
    if (known.size() >= 100 || !known.insert({kind, pc, other_pc}).second) return;
    const char* where = self ? kernel : "";
    say(std::string("fault\t") + kind + "\t" + where + "\t" + std::to_string(pc) + "\t" +
        std::to_string(other_pc) + "\t" + (self ? who(number, self->rank) : "main()") + "\t" +
        (other ? who(other->block, other->rank) : "") + "\t" + text + "\n");
}

void refused(const Fibre* fibre, const std::string& why) {
    self = const_cast<Fibre*>(fibre);
    fault("refused", 0, why);
    stop();
}

// ---------------------------------------- memory

Memory* find(Address at) {
    auto next = by_address.upper_bound(at);
    if (next == by_address.begin()) return nullptr;
    Memory* memory = std::prev(next)->second;
    return at - memory->begin < memory->bytes && !memory->freed ? memory : nullptr;
}

void add(const void* at, size_t bytes, const std::string& name, unsigned element, bool is_shared,
         uint32_t writer) {
    Access by{};
    by.block = writer;
    memories.push_back({Address(at), bytes, name, element, is_shared});
    memories.back().cells.assign((bytes + 3) / 4, Cell{by, {}});
    by_address[Address(at)] = &memories.back();
}

void add_memory(const void* at, size_t bytes, const char* name, unsigned element) {
    static int unnamed = 0;
    if (Memory* memory = find(Address(at)))
        memory->name = name;  // by an Array, which cudaMalloc has added
    else
        add(at, bytes, "array " + std::to_string(++unnamed), element, false, NOBODY);
}

void free_memory(const void* at) {
    Memory* memory = find(Address(at));
    if (!memory) return;
    by_address.erase(memory->begin);
    memory->freed = true, memory->cells.clear();
}

// Of what lies at an address: its name, and which element or byte.
std::string place(Address at) {
    Memory* best = nullptr;
    auto distance = [&](const Memory& m) {
        Address last = m.begin + m.bytes - 1;
        return at < m.begin ? m.begin - at : at > last ? at - last : 0;
    };
    for (Memory& m : memories)
        if (m.bytes && (!best || distance(m) < distance(*best))) best = &m;
    if (at < 4096) return "a null pointer";
    if (!best || distance(*best) > 1 << 20)
        return "no array: the CPU's own memory, or a wild pointer";
    long long offset = at - best->begin, size = best->element;
    std::string text = size && offset % size == 0 ? "[" + std::to_string(offset / size) + "]"
                                                  : " + " + std::to_string(offset) + " bytes";
    text = best->name + text;
    if (best->freed) text += ", which was freed";
    if (!distance(*best)) return text;
    return text + "; " + best->name + " has " +
           (size ? std::to_string(best->bytes / size) + " elements"
                 : std::to_string(best->bytes) + " bytes");
}

// From now on a cell is `unit` bytes.
void refine(Memory& memory, unsigned unit) {
    std::vector<Cell> cells;
    for (size_t i = 0; i < memory.cells.size(); i++)
        cells.insert(cells.end(), memory.unit / unit, memory.cells[i]);
    memory.cells = std::move(cells), memory.unit = unit;
}

// ---------------------------------------- what happens before what

bool before(const Access& a) {
    if (a.block < first) return true;
    if (a.block == number) {
        if (a.epoch == PENDING) return false;
        if (a.rank == self->rank || a.epoch < epoch) return true;
        return a.rank / 32 == self->rank / 32 && a.clock <= clocks[self->rank * 32 + a.rank % 32];
    }
    auto found = known.find(a.block);
    if (found == known.end()) return false;
    for (const Known& k : found->second)
        if ((k.seen < epoch || k.by == self->rank) &&
            (a.epoch < k.epoch || (a.rank == k.rank && a.clock <= k.clock)))
            return true;
    return false;
}

void barrier_opens() {
    epoch++, spins = 0;
    close_requests();
}

void warp_synced(unsigned first_rank, unsigned mask) {
    uint32_t joined[32] = {};
    for (int i = 0; i < 32; i++)
        for (int lane = 0; lane < 32 && mask >> i & 1; lane++)
            joined[lane] = std::max(joined[lane], clocks[(first_rank + i) * 32 + lane]);
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) {
            std::copy(joined, joined + 32, &clocks[(first_rank + i) * 32]);
            clocks[(first_rank + i) * 32 + i]++;
        }
}

void fence() {
    fenced[self->rank] = epoch;
    for (Known& k : acquired)
        if (k.by == self->rank) known[k.block].push_back(k), k.block = NOBODY;
    acquired.erase(std::remove_if(acquired.begin(), acquired.end(),
                                  [](const Known& k) { return k.block == NOBODY; }),
                   acquired.end());
}

// An atomic operation publishes what was fenced since the last barrier but one, and sees what
// others have published at the same address.
void publish(Address at) {
    unsigned rank = self->rank;
    uint32_t& clock = clocks[rank * 32 + rank % 32];
    auto& here = released[at];
    for (Known k : here)
        if (k.block != number) k.by = rank, k.seen = epoch, acquired.push_back(k);
    if (fenced[rank] && fenced[rank] + 1 >= epoch)
        here.push_back({number, rank, clock++, epoch, 0, 0});
}

// ---------------------------------------- accesses

// This thread has made SPIN accesses since it was resumed. It may wait for another one: let the
// others run. If nobody has written anything for SPINS such turns, nobody ever will.
void spin(uint32_t pc) {
    busy = 0;
    if (++spins > SPINS) {
        fault("hang", pc, "it waits for what no thread of its block writes");
        stop();
    }
    yield();
}

void race(const char* mine, const Access& other, bool other_writes, uint32_t pc, Address at) {
    std::string theirs = other.epoch == PENDING ? "cp.async" : other.atomic ? "atomic"
                         : other_writes        ? "write"
                                               : "read";
    fault((theirs + " and " + mine).c_str(), pc, place(at), &other);
}

// An access by a thread of a kernel, or with self == nullptr by the host.
void access(Address at, size_t bytes, Mode mode, uint32_t pc) {
    Fibre* me = self;
    if (me) {
        auto local = [&](Address p) { return p - Address(me->stack.get()) < STACK; };
        if (local(at) || me->quiet || !local(Address(__builtin_frame_address(0)))) return;
        if (at - Address(&self) < sizeof(self) ||
            at - Address(me->block) < sizeof(Block) ||
            at - Address(me->block->fibres.data()) < me->block->fibres.size() * sizeof(Fibre))
            return;  // the emulator's own: threadIdx and the like
        if (me != last_thread) busy = 0, last_thread = me;
        last_pc = pc;
        if (++busy > SPIN) spin(pc);
    }
    Site& site = site_of(pc);
    Memory* memory = site.memory;
    if (!memory || at - memory->begin >= memory->bytes || memory->freed)
        memory = site.memory = find(at);
    const char* outside = mode == READ ? "read outside" : "write outside";
    if (!memory) {
        if (!me || at - Address(&__executable_start) < size_t(&end - &__executable_start)) return;
        fault(outside, pc, place(at));
        stop();
    }
    if (at + bytes > memory->begin + memory->bytes) {
        fault(outside, pc, place(at + bytes - 1));
        stop();
    }
    if (me && counting) count(site, me->rank, at, bytes, mode, memory->is_shared);
    if (mode == WRITE) spins = 0;
    if (me && mode == ATOMIC) publish(at);
    if (memory->unit > 1 && (bytes % memory->unit || (at - memory->begin) % memory->unit))
        refine(*memory, bytes % 2 || (at - memory->begin) % 2 ? 1 : 2);
    Access now;
    now.block = me ? number : HOST, now.pc = pc, now.atomic = mode == ATOMIC;
    now.rank = me ? me->rank : 0, now.epoch = me ? epoch : 0;
    now.clock = me ? clocks[me->rank * 32 + me->rank % 32] : 0;
    size_t i = (at - memory->begin) / memory->unit;
    for (size_t last = (at - memory->begin + bytes - 1) / memory->unit; i <= last; i++) {
        Cell& cell = memory->cells[i];
        Access* by = cell.shared;
        Address here = memory->begin + i * memory->unit;
        bool unwritten = cell.write.block == NOBODY ||
                         (memory->is_shared && cell.write.block != number);
        if (mode != WRITE && unwritten) fault("unwritten", pc, place(here));
        if (!me) {
            if (mode == WRITE) cell.write = now;
            continue;
        }
        bool stale = memory->is_shared && unwritten;  // of another block
        const char* word = mode == READ ? "read" : mode == WRITE ? "write" : "atomic";
        if (!stale && !before(cell.write)) race(word, cell.write, true, pc, here);
        // After its own atomic operation a thread sees the others' on the same word.
        bool follows = by[0].atomic && by[0].block == number && by[0].rank == now.rank;
        for (int k = 0; k < 3 && !follows; k++)
            if (by[k].block >= first && (mode == WRITE || by[k].atomic != now.atomic) &&
                !(memory->is_shared && by[k].block != number) && !before(by[k]))
                race(word, by[k], false, pc, here);
        if (mode == WRITE) {
            cell.write = now;
            by[0] = by[1] = by[2] = Access();
            continue;
        }
        bool same_warp = by[0].block == number && by[0].rank / 32 == now.rank / 32;
        if (by[0].block < first || (same_warp && by[0].rank == now.rank)) {
        } else if (same_warp) {
            by[1] = by[0];
        } else {
            bool mine = by[2].block == number && by[2].rank / 32 == now.rank / 32 &&
                        by[2].rank != now.rank;
            by[1] = mine ? by[2] : Access();
            by[2] = by[0];
        }
        by[0] = now;
    }
}

// A GPU loads and stores 2, 4, 8 or 16 bytes at multiples of as many.
void misaligned(Address at, unsigned alignment, uint32_t pc) {
    if (!self || self->quiet) return;
    fault("misaligned", pc, place(at) + ", not at a multiple of " + text(alignment) + " bytes");
    stop();
}

void changed() { spins = 0; }  // by an atomic operation

// A cp.async has begun: what it writes is nobody's until it is waited for.
void copy_begins(const Copy& copy, uint32_t pc) {
    if (copy.valid) access(Address(copy.from), copy.valid, READ, pc - 1);  // a site of its own
    access(Address(copy.to), 16, WRITE, pc);
    Memory& memory = *find(Address(copy.to));
    for (size_t i = 0; i < 16; i += memory.unit)
        memory.cells[(Address(copy.to) - memory.begin + i) / memory.unit].write.epoch = PENDING;
}

void copy_ends(const Copy& copy) {
    Memory& memory = *find(Address(copy.to));
    for (size_t i = 0; i < 16; i += memory.unit) {
        Access& write = memory.cells[(Address(copy.to) - memory.begin + i) / memory.unit].write;
        if (write.block == number && write.rank == self->rank)
            write.epoch = epoch, write.clock = clocks[self->rank * 32 + self->rank % 32];
    }
}

void matrix_read(const void* row, uint32_t pc) { access(Address(row), 16, READ, pc); }

}  // namespace cuda_on_cpu::watch

// The profiler of watch.h: requests, sectors and wavefronts of each load and store in a program.
//
// The n-th time that each lane of a warp comes to a load, counted from the block's last barrier, is
// one request. Global memory answers it in sectors of 32 bytes: ideal are as many as its bytes
// fill. Shared memory has 32 banks of 4 bytes and answers in wavefronts, in each of which a bank
// gives one word: ideal is one for each 128 bytes. Lanes that bring 8 or 16 bytes go in groups of
// 16 or 8, and so do the eight rows of each matrix of an ldmatrix.
#pragma once
#include <array>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "cuda_on_cpu.h"

extern "C" char __executable_start, etext;

namespace cuda_on_cpu::watch {

struct Request {
    uintptr_t at[32] = {};  // of each lane; 0: it did not come
    unsigned lanes = 0, bytes = 0;
    bool is_shared = false;
};

struct Memory;
using Totals = std::array<double, 5>;  // requests, lanes, bytes, sectors or wavefronts, ideal

struct Site {  // a load or store in the program
    uint32_t pc;
    int mode = 0;
    Memory* memory = nullptr;         // that it went to last
    uint16_t came[MAX_THREADS] = {};  // since the last barrier
    std::vector<Request> requests[MAX_THREADS / 32];
    Totals totals[2] = {};            // of this launch: global, shared
    bool open = false;
};
// [pc, is_shared, mode, kernel]
inline std::map<std::tuple<uint32_t, int, int, std::string>, Totals> lines;
inline std::vector<Site*> open_sites, used_sites;  // since the last barrier, in this launch

inline size_t different(std::vector<uintptr_t>& values) {  // how many; they come first
    std::sort(values.begin(), values.end());
    return std::unique(values.begin(), values.end()) - values.begin();
}

inline Site& site_of(uint32_t pc) {
    static std::vector<Site*> sites(&etext - &__executable_start);
    Site*& site = sites[pc - uintptr_t(&__executable_start)];
    if (!site) site = new Site{pc};
    return *site;
}

inline void count(Site& site, unsigned rank, uintptr_t at, size_t bytes, int mode, bool is_shared) {
    if (!site.open) open_sites.push_back(&site), site.open = true;
    auto& requests = site.requests[rank / 32];
    if (site.came[rank] >= requests.size()) requests.emplace_back();
    Request& request = requests[site.came[rank]++];
    request.at[rank % 32] = at, request.lanes++;
    request.bytes = bytes, request.is_shared = is_shared, site.mode = mode;
}

inline void add_sectors(const Request& request, Totals& to) {
    std::vector<uintptr_t> sectors, places;
    for (uintptr_t at : request.at) {
        for (uintptr_t s = at / 32; at && s <= (at + request.bytes - 1) / 32; s++)
            sectors.push_back(s);
        if (at) places.push_back(at);
    }
    to[3] += different(sectors), to[4] += (different(places) * request.bytes + 31) / 32;
}

inline void add_wavefronts(const Request& request, Totals& to) {
    unsigned group = request.bytes >= 16 ? 8 : request.bytes >= 8 ? 16 : 32;
    for (unsigned lane = 0; lane < 32; lane += group) {
        std::vector<uintptr_t> words;
        for (unsigned i = lane; i < lane + group; i++)
            for (unsigned byte = 0; request.at[i] && byte < request.bytes; byte += 4)
                words.push_back((request.at[i] + byte) / 4);
        words.resize(different(words));
        unsigned most = 0, of_bank[32] = {};
        for (uintptr_t word : words) most = std::max(most, ++of_bank[word % 32]);
        to[3] += most, to[4] += (words.size() + 31) / 32;
    }
}

// At a barrier.
inline void close_requests() {
    for (Site* site : open_sites) {
        if (!site->totals[0][0] && !site->totals[1][0]) used_sites.push_back(site);
        for (auto& of_warp : site->requests) {
            for (const Request& request : of_warp) {
                Totals& to = site->totals[request.is_shared];
                to[0]++, to[1] += request.lanes, to[2] += request.lanes * request.bytes;
                request.is_shared ? add_wavefronts(request, to) : add_sectors(request, to);
            }
            of_warp.clear();
        }
        std::fill(site->came, site->came + MAX_THREADS, 0);
        site->open = false;
    }
    open_sites.clear();
}
}  // namespace cuda_on_cpu::watch

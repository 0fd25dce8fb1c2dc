// Runs a CUDA kernel on a CPU (x86-64, Linux) for tests. The kernel may use CUDA's thread indices,
// __syncthreads, __syncwarp and all that light_tts/kernels/cuda/hopper.cuh declares, which is defined here.
//
// Every CUDA thread of a cluster has a stack of its own, and one of them runs at a time, until it waits for
// others. `run` returns what went wrong, with the threads concerned: a deadlock; lanes of a warp in different
// instructions; an address outside of the shared memory or misaligned; an index outside of an array; a store
// to a block that has not begun or has ended. Shared memory begins as NaNs (all bits 1). What is read or
// written beyond an array in global memory is not found, unless nothing is mapped there.
//
// Seed 0 runs warps in turn, and copies asynchronously at the latest (when they are waited for). With another
// seed the blocks and warps run in a random order, each as far as it can, and each copy is done at once or at the
// latest, at random: what a missing barrier or wait allows. What is sent to other blocks arrives at once.
#pragma once

#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <cmath>
#include <string>
#include <vector>

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#define CUDA_ON_CPU
#include "../../light_tts/kernels/cuda/hopper.cuh"

// __shared__ is left out: use DYNAMIC_SHARED.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(bytes) alignas(bytes)
#define DEVICE inline
#define DYNAMIC_SHARED(name) unsigned char* name = cuda_on_cpu::current->warp->block->shared
#define threadIdx (cuda_on_cpu::current->index)
#define blockIdx (cuda_on_cpu::current->warp->block->index)
#define blockDim (cuda_on_cpu::block_size)
#define gridDim (cuda_on_cpu::grid_size)

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Continues on the stack `to`, which an earlier call or `prepare` has left, and stores where this one is.
extern "C" void cuda_on_cpu_switch(void** from, void* to) __attribute__((visibility("hidden")));
extern "C" void cuda_on_cpu_resume() __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden cuda_on_cpu_switch
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
.hidden cuda_on_cpu_resume
.globl cuda_on_cpu_resume
.type cuda_on_cpu_resume, @function
cuda_on_cpu_resume:
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace cuda_on_cpu {

const u32 ALL_LANES = ~0u;
const u32 RANK_SHIFT = 24;          // an address in a block of the cluster: rank + 1, then 24 bits
const size_t STACK_BYTES = 1 << 16;  // with a page below that must not be touched
const size_t PAGE = 4096;
const size_t SHARED_STRIDE = 1 << 21;  // bytes between the shared memories of two blocks
const u32 MOST_SHARED = 227 * 1024;

struct Block;
struct Warp;

struct Copy {
  unsigned char* to;
  const void* from;
};

struct Thread {
  void* stack;
  Warp* warp;
  uint3 index;
  u32 lane;
  bool exited;
  const char* waits_at;  // the name of what it waits at, or null
  int line;
  void* operands;  // of the instruction that the warp executes together
  bool arrived;    // at the cluster's barrier, without having waited
  u32 phase;       // of the cluster's barrier at the arrival
  u32 receipt;     // whose bytes it waits for
  std::vector<std::vector<Copy>> copies;  // committed groups that are not done
  std::vector<Copy> uncommitted;
};

struct Warp {
  Block* block;
  Thread* threads;
  u32 ready;    // lanes that can run, without the one that runs
  u32 live;     // lanes that have not exited
  u32 arrived;  // lanes that wait for the others of the warp
  u32 last;     // the lane that ran last
  u64 priority;
};

struct Block {
  u32 rank;
  uint3 index;
  unsigned char* shared;
  bool begun;
  u32 live, arrived;  // threads: not exited; waiting at __syncthreads
  Warp* warps;
};

inline Thread* current;
inline uint3 block_size, grid_size;
inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline std::vector<Block> blocks;
inline u32 cluster_live, cluster_arrived, cluster_phase;
inline u32 shared_size;
inline u32 turn;  // the warp that ran last
inline u64 seed, random_state;
inline bool blocks_together;  // priorities are those of blocks first
inline std::string failure;
inline void* main_stack;
inline unsigned char *stacks, *shared_memories;
inline size_t stacks_mapped, shared_mapped;
inline void (*kernel_call)(const void*);
inline const void* kernel_params;

inline u64 draw() {  // 64 random bits (splitmix64)
  u64 z = random_state += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

inline bool coin() { return seed && (draw() & 1); }

// ---- failures

inline std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
inline std::string format(const char* pattern, ...) {
  char text[512];
  va_list values;
  va_start(values, pattern);
  vsnprintf(text, sizeof text, pattern, values);
  va_end(values);
  return text;
}

inline std::string name_of(const Thread& thread) {
  const Block& block = *thread.warp->block;
  return format("block (%u, %u), thread %u", block.index.x, block.index.y, thread.index.x);
}

inline std::string place(const Thread& thread) {
  if (thread.exited) return "exited";
  if (!thread.waits_at) return "ready";
  return format("waits at %s, line %d", thread.waits_at, thread.line);
}

inline void leave() {  // the threads, for `run`
  void* unused;
  cuda_on_cpu_switch(&unused, main_stack);
}

[[noreturn]] inline void fail(const std::string& what) {
  failure = name_of(*current) + ": " + what;
  leave();
  __builtin_unreachable();
}

inline std::string describe_threads() {
  std::string text;
  for (const Block& block : blocks) {
    u32 first = 0;
    const Thread* of_block = block.warps->threads;
    for (u32 i = 1; i <= block_size.x; ++i) {
      if (i < block_size.x && place(of_block[i]) == place(of_block[first])) continue;
      text += format("\n  block (%u, %u), threads %u to %u: ", block.index.x, block.index.y, first, i - 1);
      text += place(of_block[first]);
      first = i;
    }
    if (text.size() > 8000) return text + "\n  ...";
  }
  return text;
}

// ---- turns

inline void draw_priorities() {
  blocks_together = draw() & 1;
  for (Block& block : blocks) {
    u64 of_block = blocks_together ? draw() << 32 : 0;
    for (u32 i = 0; i < block_size.x / 32; ++i) block.warps[i].priority = of_block | (draw() >> 32);
  }
}

inline Warp* choose_warp() {
  if (!seed) {
    for (u32 i = 1; i <= warps.size(); ++i) {
      u32 next = (turn + i) % warps.size();
      if (warps[next].ready) return &warps[next];
    }
    return nullptr;
  }
  if (draw() % 16 == 0) draw_priorities();
  Warp* best = nullptr;
  for (Warp& warp : warps)
    if (warp.ready && (!best || warp.priority > best->priority)) best = &warp;
  return best;
}

// Run a lane of `warp` that is ready, or one of any warp if there is none; returns when `current` runs again.
inline void run_another(Warp* warp) {
  if (!warp || !warp->ready) warp = choose_warp();
  if (!warp) {
    if (cluster_live) failure = "deadlock:" + describe_threads();
    leave();
    return;
  }
  turn = u32(warp - warps.data());
  u32 from = (warp->last + 1) & 31;
  u32 rotated = from ? warp->ready >> from | warp->ready << (32 - from) : warp->ready;
  u32 lane = (from + __builtin_ctz(rotated)) & 31;
  warp->last = lane;
  warp->ready &= ~(1u << lane);
  warp->block->begun = true;
  Thread* previous = current;
  current = warp->threads + lane;
  if (current != previous) cuda_on_cpu_switch(&previous->stack, current->stack);
}

inline void make_ready(Thread& thread) {
  thread.waits_at = nullptr;
  thread.warp->ready |= 1u << thread.lane;
}

// With a seed: now and then, let another warp run.
inline void give_turn() {
  if (!seed || draw() % 256) return;
  draw_priorities();
  make_ready(*current);
  run_another(nullptr);
}

// ---- barriers

// Whether all threads of the block are there; then all may go on.
inline bool complete_block(Block& block) {
  if (!block.arrived || block.arrived < block.live) return false;
  block.arrived = 0;
  for (u32 i = 0; i < block_size.x; ++i) {
    Thread& thread = block.warps->threads[i];
    if (thread.waits_at && !strcmp(thread.waits_at, "__syncthreads")) make_ready(thread);
  }
  return true;
}

inline void complete_cluster() {
  if (!cluster_arrived || cluster_arrived < cluster_live) return;
  cluster_arrived = 0;
  ++cluster_phase;
  for (Thread& thread : threads)
    if (thread.waits_at && !strcmp(thread.waits_at, "cluster_wait")) make_ready(thread);
}

inline void wait_at(const char* name, int line) {
  current->waits_at = name;
  current->line = line;
}

// ---- instructions of a whole warp

// Executes `perform(warp)` once for the warp, when all its lanes have called it; `operands` are those of this
// lane. `aligned`: all 32 lanes must call it, at one line; otherwise exited ones may be missing.
template <class Perform>
inline void complete_warp(Warp& warp, bool aligned, const Perform& perform) {
  const Thread& first = warp.threads[__builtin_ctz(warp.arrived)];
  for (u32 lane = 0; lane < 32; ++lane) {
    const Thread& other = warp.threads[lane];
    bool there = warp.arrived >> lane & 1;
    if (there ? strcmp(other.waits_at, first.waits_at) || (aligned && other.line != first.line) : aligned)
      fail("the warp is not together: thread " + std::to_string(first.index.x) + " " + place(first) +
           ", thread " + std::to_string(other.index.x) + " " + place(other));
  }
  perform(warp);
  for (u32 lane = 0; lane < 32; ++lane)
    if (warp.arrived >> lane & 1) warp.threads[lane].waits_at = nullptr;
  warp.ready |= warp.arrived;
  warp.arrived = 0;
}

inline void nothing(Warp&) {}

template <class Perform>
inline void together(const char* name, int line, bool aligned, void* operands, const Perform& perform) {
  Thread& me = *current;
  Warp& warp = *me.warp;
  wait_at(name, line);
  me.operands = operands;
  warp.arrived |= 1u << me.lane;
  if (warp.arrived == warp.live) {
    complete_warp(warp, aligned, perform);
    warp.ready &= ~(1u << me.lane);
    give_turn();
    return;
  }
  run_another(&warp);
}

template <class Operands>
inline Operands& operands_of(Warp& warp, u32 lane) {
  return *(Operands*)warp.threads[lane].operands;
}

// ---- memory

// The place of `bytes` bytes at a shared address of this block.
inline unsigned char* own_place(u32 address, u32 bytes, const char* name) {
  if (address >> RANK_SHIFT) fail(std::string(name) + ": an address in another block");
  if (address % bytes || address + bytes > shared_size)
    fail(format("%s: %u bytes at %u of %u bytes of shared memory", name, bytes, address, shared_size));
  return current->warp->block->shared + address;
}

// Write a value to the shared memory of another block, which is returned.
template <class Value>
inline Block& send(u32 address, const Value& value) {
  u32 rank = (address >> RANK_SHIFT) - 1, offset = address & ((1u << RANK_SHIFT) - 1), bytes = sizeof value;
  if (rank >= blocks.size()) fail("send_to_block: an address that is not from address_in_block");
  if (offset % bytes || offset + bytes > shared_size)
    fail(format("send_to_block: %u bytes at %u of %u bytes of shared memory", bytes, offset, shared_size));
  Block& block = blocks[rank];
  if (!block.begun) fail("send_to_block: the block has not begun; wait at a barrier of the cluster");
  if (!block.live) fail("send_to_block: the block has ended; wait at a barrier of the cluster");
  memcpy(block.shared + offset, &value, bytes);
  return block;
}

inline void perform_copies(size_t left) {
  auto& groups = current->copies;
  if (groups.size() <= left) return;
  size_t count = groups.size() - left;
  for (size_t i = 0; i < count; ++i)
    for (const Copy& copy : groups[i]) memcpy(copy.to, copy.from, 16);
  groups.erase(groups.begin(), groups.begin() + count);
}

// ---- the life of a thread

inline void exit_thread() {
  Thread& me = *current;
  Warp& warp = *me.warp;
  Block& block = *warp.block;
  me.copies.push_back(me.uncommitted);
  perform_copies(0);
  me.exited = true;
  warp.live &= ~(1u << me.lane);
  --block.live;
  --cluster_live;
  if (me.arrived && me.phase == cluster_phase) --cluster_arrived;
  if (warp.arrived && warp.arrived == warp.live) {
    const Thread& other = warp.threads[__builtin_ctz(warp.arrived)];
    if (strcmp(other.waits_at, "__syncwarp"))
      fail(format("exits while others of its warp wait: thread %u ", other.index.x) + place(other));
    complete_warp(warp, false, nothing);
  }
  complete_block(block);
  complete_cluster();
  run_another(&warp);
}

inline void thread_main() {
  kernel_call(kernel_params);
  exit_thread();
}

inline void prepare(Thread& thread, u32 number) {
  // The offset keeps the stacks from falling onto the same lines of the cache.
  unsigned char* top = stacks + (number + 1) * STACK_BYTES - number % 61 * 192;
  void** frame = (void**)top - 8;
  memset(frame, 0, 64);
  frame[6] = (void*)thread_main;
  thread.stack = frame;
}

// ---- invalid addresses

inline std::string describe_fault(int signal, uintptr_t address) {
  uintptr_t shared = address - (uintptr_t)shared_memories, stack = address - (uintptr_t)stacks;
  if (signal == SIGSEGV && shared < shared_mapped) {
    long offset = long(address - (uintptr_t)blocks[shared / SHARED_STRIDE].shared);
    return format("uses byte %ld of %u bytes of shared memory", offset, shared_size);
  }
  if (signal == SIGSEGV && stack < stacks_mapped) return "uses too much stack";
  if (signal == SIGSEGV) return format("uses the invalid address %#lx", (unsigned long)address);
  return strsignal(signal);
}

inline void on_fault(int signal, siginfo_t* info, void* context) {
  if (!current) {  // not the kernel's
    std::signal(signal, SIG_DFL);
    return;
  }
  auto& registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  Dl_info library{};
  dladdr((void*)registers[REG_RIP], &library);
  failure = name_of(*current) + ": " + describe_fault(signal, (uintptr_t)info->si_addr) +
            format(" [%s %#lx]", library.dli_fname ? library.dli_fname : "?",
                   (unsigned long)(registers[REG_RIP] - (uintptr_t)library.dli_fbase));
  registers[REG_RSP] = (greg_t)main_stack;  // go on where `leave` would
  registers[REG_RIP] = (greg_t)cuda_on_cpu_resume;
}

class FaultHandler {  // from its construction to its destruction
 public:
  FaultHandler() {
    stack_t own{};
    own.ss_sp = alternate_;
    own.ss_size = sizeof alternate_;
    sigaltstack(&own, &old_stack_);
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 4; ++i) sigaction(SIGNALS[i], &action, &old_[i]);
  }
  ~FaultHandler() {
    for (int i = 0; i < 4; ++i) sigaction(SIGNALS[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int SIGNALS[4] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
  alignas(16) static inline char alternate_[1 << 16];
  stack_t old_stack_;
  struct sigaction old_[4];
};

// What g++ -fsanitize=alignment,bounds calls, with the place in the source first in `data`.
struct SourcePlace {
  const char* file;
  u32 line, column;
};

[[noreturn]] inline void fail_at(const void* data, const char* what) {
  const auto* place = (const SourcePlace*)data;
  if (!current) abort();  // not in the kernel
  fail(format("%s, %s:%u:%u", what, place->file, place->line, place->column));
}

// ---- launch

inline void map_memory(size_t thread_count, size_t block_count) {
  stacks_mapped = thread_count * STACK_BYTES;
  stacks = (unsigned char*)mmap(nullptr, stacks_mapped, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  for (size_t i = 0; i < thread_count; ++i) mprotect(stacks + i * STACK_BYTES, PAGE, PROT_NONE);
  shared_mapped = block_count * SHARED_STRIDE;
  shared_memories = (unsigned char*)mmap(nullptr, shared_mapped, PROT_NONE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  for (size_t i = 0; i < block_count; ++i)
    mprotect(shared_memories + i * SHARED_STRIDE + SHARED_STRIDE / 2, SHARED_STRIDE / 4,
             PROT_READ | PROT_WRITE);
}

// Every kernel is a library with memory of its own, and a process cannot have many pages with gaps.
inline void unmap_memory() {
  munmap(stacks, stacks_mapped);
  munmap(shared_memories, shared_mapped);
}

inline void run_cluster(u32 first_x, u32 y, u32 cluster_size) {
  u32 warp_count = block_size.x / 32;
  threads.assign(cluster_size * block_size.x, Thread{});
  warps.assign(cluster_size * warp_count, Warp{});
  blocks.assign(cluster_size, Block{});
  cluster_live = u32(threads.size());
  cluster_arrived = cluster_phase = 0;
  for (u32 rank = 0; rank < cluster_size; ++rank) {
    Block& block = blocks[rank];
    // The end of the shared memory is at the end of the readable pages.
    unsigned char* end = shared_memories + rank * SHARED_STRIDE + SHARED_STRIDE / 4 * 3;
    block.rank = rank;
    block.index = {first_x + rank, y, 0};
    block.shared = end - shared_size;
    block.live = block_size.x;
    block.warps = &warps[rank * warp_count];
    memset(block.shared, 0xff, shared_size);
    for (u32 w = 0; w < warp_count; ++w) {
      Warp& warp = block.warps[w];
      warp.block = &block;
      warp.threads = &threads[rank * block_size.x + w * 32];
      warp.ready = warp.live = ALL_LANES;
      warp.last = seed ? u32(draw() % 32) : 31;
      for (u32 lane = 0; lane < 32; ++lane) {
        Thread& thread = warp.threads[lane];
        thread.warp = &warp;
        thread.lane = lane;
        thread.index = {w * 32 + lane, 0, 0};
        prepare(thread, u32(&thread - threads.data()));
      }
    }
  }
  turn = u32(warps.size()) - 1;
  if (seed) draw_priorities();
  Warp* warp = choose_warp();
  warp->last = (warp->last + 1) & 31;
  warp->ready &= ~(1u << warp->last);
  warp->block->begun = true;
  current = warp->threads + warp->last;
  cuda_on_cpu_switch(&main_stack, current->stack);
  current = nullptr;
}

struct Launch {
  u32 grid_x, grid_y, cluster_size, block_threads, shared_bytes;
  u64 seed;
};

// Runs the kernel and returns what went wrong, or null.
template <class Params>
inline const char* run(void (*kernel)(Params), const Launch& launch, const void* params, size_t params_size) {
  static void (*called)(Params);
  called = kernel;
  kernel_call = [](const void* of) { called(*(const Params*)of); };
  kernel_params = params;
  failure.clear();
  if (params_size != sizeof(Params))
    failure = format("the parameters take %zu bytes, not %zu", sizeof(Params), params_size);
  else if (!launch.cluster_size || launch.grid_x % launch.cluster_size)
    failure = "the grid is no multiple of the cluster";
  else if (!launch.block_threads || launch.block_threads % 32 || launch.block_threads > 1024)
    failure = "the threads of a block are no multiple of 32 up to 1024";
  else if (launch.shared_bytes > MOST_SHARED)
    failure = format("a block has at most %u bytes of shared memory", MOST_SHARED);
  if (!failure.empty()) return failure.c_str();

  shared_size = (launch.shared_bytes + 15) / 16 * 16;
  block_size = {launch.block_threads, 1, 1};
  grid_size = {launch.grid_x, launch.grid_y, 1};
  seed = random_state = launch.seed;
  map_memory(size_t(launch.cluster_size) * launch.block_threads, launch.cluster_size);
  FaultHandler handler;
  for (u32 y = 0; y < launch.grid_y && failure.empty(); ++y)
    for (u32 x = 0; x < launch.grid_x && failure.empty(); x += launch.cluster_size)
      run_cluster(x, y, launch.cluster_size);
  unmap_memory();
  return failure.empty() ? nullptr : failure.c_str();
}

}  // namespace cuda_on_cpu

extern "C" void __ubsan_handle_type_mismatch_v1(void* data, void*) {
  cuda_on_cpu::fail_at(data, "uses a misaligned address");
}
extern "C" void __ubsan_handle_out_of_bounds(void* data, void*) {
  cuda_on_cpu::fail_at(data, "uses an index outside of an array");
}

// ---- what kernels call; `line` is that of the call

static inline void __syncwarp(int line = __builtin_LINE()) {
  cuda_on_cpu::together("__syncwarp", line, false, nullptr, cuda_on_cpu::nothing);
}

static inline void __syncthreads(int line = __builtin_LINE()) {
  using namespace cuda_on_cpu;
  wait_at("__syncthreads", line);
  Block& block = *current->warp->block;
  ++block.arrived;
  run_another(complete_block(block) ? nullptr : current->warp);
}

DEVICE u32 shared_address(const void* pointer) {
  using namespace cuda_on_cpu;
  u64 offset = (const unsigned char*)pointer - current->warp->block->shared;
  if (offset > shared_size) fail("shared_address: not in the block's shared memory");
  return u32(offset);
}

namespace cuda_on_cpu {

struct MatrixOperands {
  u32* to;
  const unsigned char* row;
};

template <bool TRANSPOSED>
inline void load(u32* to, u32 address, int line) {
  const char* name = TRANSPOSED ? "load_matrices_transposed" : "load_matrices";
  MatrixOperands mine{to, own_place(address, 16, name)};
  together(name, line, true, &mine, [](Warp& warp) {
    for (u32 matrix = 0; matrix < 4; ++matrix) {
      half_bits rows[8][8];
      for (u32 row = 0; row < 8; ++row)
        memcpy(rows[row], operands_of<MatrixOperands>(warp, matrix * 8 + row).row, 16);
      for (u32 lane = 0; lane < 32; ++lane) {
        u32 g = lane / 4, t = lane % 4;
        u32 low = TRANSPOSED ? rows[2 * t][g] : rows[g][2 * t];
        u32 high = TRANSPOSED ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
        operands_of<MatrixOperands>(warp, lane).to[matrix] = low | high << 16;
      }
    }
  });
}

struct ProductOperands {
  float* c;
  const u32* a;
  u32 b[2];
};

inline float to_float(u32 bits) {
  half_bits low = half_bits(bits);
  _Float16 value;
  memcpy(&value, &low, 2);
  return float(value);
}

inline u32 to_half(float value) {
  _Float16 rounded = _Float16(value);
  half_bits bits;
  memcpy(&bits, &rounded, 2);
  return bits;
}

inline float from_bf16(u32 bits) {
  float value;
  bits <<= 16;
  memcpy(&value, &bits, 4);
  return value;
}

inline u32 to_bf16(float value) {
  u32 bits;
  memcpy(&bits, &value, 4);
  return value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
}

template <float TO_FLOAT(u32)>
__attribute__((no_sanitize("bounds"))) inline void multiply_add_warp(Warp& warp) {
  float a[16][16], b[16][8], c[16][8];
  for (u32 lane = 0; lane < 32; ++lane) {
    u32 g = lane / 4, t = lane % 4;
    const auto& from = operands_of<ProductOperands>(warp, lane);
    for (u32 i = 0; i < 4; ++i) {
      a[g + i % 2 * 8][2 * t + i / 2 * 8] = TO_FLOAT(from.a[i]);
      a[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = TO_FLOAT(from.a[i] >> 16);
      c[g + i / 2 * 8][2 * t + i % 2] = from.c[i];
    }
    for (u32 i = 0; i < 2; ++i) {
      b[2 * t + i * 8][g] = TO_FLOAT(from.b[i]);
      b[2 * t + i * 8 + 1][g] = TO_FLOAT(from.b[i] >> 16);
    }
  }
  for (u32 row = 0; row < 16; ++row)
    for (u32 k = 0; k < 16; ++k)
      for (u32 column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
  for (u32 lane = 0; lane < 32; ++lane) {
    u32 g = lane / 4, t = lane % 4;
    float* to = operands_of<ProductOperands>(warp, lane).c;
    for (u32 i = 0; i < 4; ++i) to[i] = c[g + i / 2 * 8][2 * t + i % 2];
  }
}

template <class Value>
struct ShuffleOperands {
  Value value;
  u32 from;
};

// The value of lane `from`, modulo 32.
template <class Value>
inline Value shuffle(Value value, u32 from, const char* name, int line) {
  ShuffleOperands<Value> mine{value, from & 31};
  together(name, line, true, &mine, [](Warp& warp) {
    Value values[32];
    auto of = [&](u32 lane) -> auto& { return operands_of<ShuffleOperands<Value>>(warp, lane); };
    for (u32 lane = 0; lane < 32; ++lane) values[lane] = of(lane).value;
    for (u32 lane = 0; lane < 32; ++lane) of(lane).value = values[of(lane).from];
  });
  return mine.value;
}

}  // namespace cuda_on_cpu

DEVICE void load_matrices(u32 (&to)[4], u32 address, int line = __builtin_LINE()) {
  cuda_on_cpu::load<false>(to, address, line);
}

DEVICE void load_matrices_transposed(u32 (&to)[4], u32 address, int line = __builtin_LINE()) {
  cuda_on_cpu::load<true>(to, address, line);
}

DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, int line = __builtin_LINE()) {
  cuda_on_cpu::ProductOperands mine{c, a, {b0, b1}};
  cuda_on_cpu::together("multiply_add", line, true, &mine, cuda_on_cpu::multiply_add_warp<cuda_on_cpu::to_float>);
}

DEVICE void multiply_add_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, int line = __builtin_LINE()) {
  cuda_on_cpu::ProductOperands mine{c, a, {b0, b1}};
  cuda_on_cpu::together("multiply_add_bf16", line, true, &mine,
                        cuda_on_cpu::multiply_add_warp<cuda_on_cpu::from_bf16>);
}

DEVICE u32 pack_halves(float first, float second) {
  return cuda_on_cpu::to_half(first) | cuda_on_cpu::to_half(second) << 16;
}

DEVICE float2 unpack_halves(u32 both) {
  return {cuda_on_cpu::to_float(both), cuda_on_cpu::to_float(both >> 16)};
}

DEVICE u32 finite_halves(u32 both) {
  for (int shift = 0; shift < 32; shift += 16)
    if ((both >> shift & 0x7c00) == 0x7c00) both = (both & ~(0x3ffu << shift)) - (1u << shift);
  return both;
}

DEVICE float reciprocal(float value) { return 1.0f / value; }

DEVICE u32 pack_bf16(float first, float second) {
  return cuda_on_cpu::to_bf16(first) | cuda_on_cpu::to_bf16(second) << 16;
}

DEVICE float2 unpack_bf16(u32 both) {
  return {cuda_on_cpu::from_bf16(both), cuda_on_cpu::from_bf16(both >> 16)};
}

DEVICE float power_of_two(float exponent) {
  float value = exp2f(exponent);
  return value < 1.17549435e-38f ? 0 : value;  // no subnormal numbers
}

DEVICE uint4 load_early(const uint4* from) { return *from; }
DEVICE u32 load_early(const u32* from) { return *from; }

DEVICE void copy_async(u32 shared, const void* from) {
  using namespace cuda_on_cpu;
  if ((uintptr_t)from % 16) fail("copy_async: the source is not a multiple of 16 bytes");
  Copy copy{own_place(shared, 16, "copy_async"), from};
  if (coin())
    memcpy(copy.to, copy.from, 16);
  else
    current->uncommitted.push_back(copy);
}

DEVICE void commit_copies() {
  using namespace cuda_on_cpu;
  current->copies.push_back(std::move(current->uncommitted));
  current->uncommitted.clear();
}

template <int LEFT>
DEVICE void wait_for_copies() {
  cuda_on_cpu::perform_copies(LEFT);
}

DEVICE u32 cluster_rank() { return cuda_on_cpu::current->warp->block->rank; }

DEVICE void cluster_arrive(int line = __builtin_LINE()) {
  using namespace cuda_on_cpu;
  Thread& me = *current;
  if (me.arrived) fail(format("cluster_arrive, line %d: a second time without cluster_wait", line));
  me.arrived = true;
  me.phase = cluster_phase;
  ++cluster_arrived;
  complete_cluster();
}

DEVICE void cluster_wait(int line = __builtin_LINE()) {
  using namespace cuda_on_cpu;
  Thread& me = *current;
  if (!me.arrived) fail(format("cluster_wait, line %d: without cluster_arrive", line));
  me.arrived = false;
  wait_at("cluster_wait", line);
  if (me.phase != cluster_phase) make_ready(me);
  run_another(me.warp);
}

DEVICE u32 address_in_block(u32 shared, u32 rank) {
  using namespace cuda_on_cpu;
  if (shared > shared_size) fail("address_in_block: an address outside of the shared memory");
  if (rank >= blocks.size()) fail(format("address_in_block: no block %u in the cluster", rank));
  return shared | (rank + 1) << RANK_SHIFT;
}

// The eight bytes of a receipt: bytes expected, bytes stored.
DEVICE void expect_bytes(u32 receipt, u32 bytes) {
  u32* counts = (u32*)cuda_on_cpu::own_place(receipt, 8, "expect_bytes");
  counts[0] = bytes, counts[1] = 0;
}

DEVICE void send_to_block(u32 address, uint4 value, u32 receipt) {
  using namespace cuda_on_cpu;
  if (address >> RANK_SHIFT != receipt >> RANK_SHIFT) fail("send_to_block: the receipt is in another block");
  Block& block = send(address, value);
  const u32 at = receipt & ((1u << RANK_SHIFT) - 1);
  u32* counts = (u32*)(block.shared + at);
  counts[1] += 16;
  if (counts[1] > counts[0]) fail("send_to_block: more bytes than expected");
  if (counts[1] < counts[0]) return;
  for (u32 i = 0; i < block_size.x; ++i) {
    Thread& thread = block.warps->threads[i];
    if (thread.waits_at && !strcmp(thread.waits_at, "wait_for_bytes") && thread.receipt == at)
      make_ready(thread);
  }
}

DEVICE void wait_for_bytes(u32 receipt, int line = __builtin_LINE()) {
  using namespace cuda_on_cpu;
  Thread& me = *current;
  const u32* counts = (const u32*)own_place(receipt, 8, "wait_for_bytes");
  wait_at("wait_for_bytes", line);
  me.receipt = receipt;
  if (counts[0] == counts[1]) make_ready(me);
  run_another(me.warp);
}

DEVICE void show_receipts() {}

DEVICE void launch_next_kernel() {}
DEVICE void wait_for_previous_kernel() {}

DEVICE void prefetch_to_l2(const void* from, u32 bytes) {
  if ((uintptr_t)from % 16 || bytes % 16) cuda_on_cpu::fail("prefetch_to_l2: no multiple of 16 bytes");
}

DEVICE float shuffle_xor(float value, int mask, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle(value, cuda_on_cpu::current->lane ^ u32(mask), "shuffle_xor", line);
}

DEVICE u64 shuffle_from(u64 value, int lane, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle(value, u32(lane), "shuffle_from", line);
}

DEVICE float inverse_root(float value) { return 1 / sqrtf(value); }
DEVICE float exponential(float value) { return expf(value); }

// The emulation's machinery (see emulator/cuda_emulator.h): runs a grid cluster by cluster, each thread of a cluster a
// fiber on this thread of the CPU. A fiber runs until it waits or ends; when all have, those whose meeting is
// complete may go on. If nobody may, the kernel would hang.
#include "emulator/cuda_emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace moeprune {
namespace emulator {
namespace {

constexpr std::size_t kStack = 128 * 1024, kGuardPage = 64 * 1024;  // a page may have 64 KiB
constexpr std::size_t kStaticSharedLimit = 48 * 1024, kCanary = 64;
constexpr unsigned char kPoison = 0xFF;
constexpr int kWarp = 32;

enum class State { ready, in_warp, in_block, in_cluster, done };

struct Fiber {
  std::size_t block, thread;  // of the cluster, of the block
  State state;
  bool started = false;
  Place place;  // the meeting, and for a warp's: who meets, what this lane brings and wants
  unsigned mask;
  std::uint64_t value;
  int source;
  jmp_buf context;
  char* memory;  // guard page, then the stack

  Fiber() {
    memory = static_cast<char*>(
        mmap(nullptr, kGuardPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory == MAP_FAILED || mprotect(memory, kGuardPage, PROT_NONE) != 0) throw std::bad_alloc();
  }
  ~Fiber() { munmap(memory, kGuardPage + kStack); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
};

struct alignas(128) Line {
  unsigned char bytes[128];
};

struct StaticShared {
  const void* key;
  std::size_t offset;
};

// An order of 0 .. n - 1: at, at + step, ... modulo n.
struct Order {
  std::size_t n, at, step;

  std::size_t next() {
    const std::size_t result = at;
    at += step;
    if (at >= n) at -= n;
    return result;
  }
};

// One grid runs at a time; this is all its state. Fibers and their stacks are kept for the next one.
std::mutex mutex;
DeviceInfo device;
std::uint64_t schedule = 0;
std::mt19937_64 shuffler;
std::vector<std::unique_ptr<Fiber>> fibers;
std::size_t active, threads, cluster;  // fibers of the cluster, threads per block, blocks
jmp_buf scheduler;
Fiber* current = nullptr;
unsigned first_block_x;
const std::function<void()>* body;
std::exception_ptr failure;
std::vector<StaticShared> statics;
std::size_t static_used, shared_used, lines_per_block;
std::vector<Line> shared_memory;   // of every block of the cluster: dynamic, then static, then the canary
std::vector<std::size_t> running;  // threads of each block that have not ended

[[noreturn]] void refuse(const std::string& what) { throw std::runtime_error("CUDA emulator: " + what); }

char* shared_base(std::size_t block) { return reinterpret_cast<char*>(&shared_memory[block * lines_per_block]); }

Order order_of(std::size_t n) {
  if (schedule == 0) return {n, 0, 1};
  if (schedule == 1) return {n, n - 1, n == 1 ? 1 : n - 1};
  std::size_t step = 1 + shuffler() % n;
  while (std::gcd(step, n) != 1) step = 1 + shuffler() % n;
  return {n, shuffler() % n, step};
}

std::string name_of(const Fiber& fiber) {
  return "thread " + std::to_string(fiber.thread) + " of block (" + std::to_string(first_block_x + fiber.block) + ", " +
         std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
}

std::string describe(const Fiber& fiber) {
  if (fiber.state == State::done) return name_of(fiber) + " has ended";
  std::ostringstream text;
  text << name_of(fiber) << " waits at " << fiber.place.operation << " ("
       << std::strrchr((std::string("/") + fiber.place.file).c_str(), '/') + 1 << ":" << fiber.place.line << ")";
  if (fiber.state == State::in_warp) text << " for the lanes of mask 0x" << std::hex << fiber.mask;
  return text.str();
}

// ---- fibers

void leave_fiber() {
  if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}

void fiber_main() {
  for (;;) {  // each turn is one CUDA thread
    try {
      (*body)();
    } catch (...) {
      failure = std::current_exception();
    }
    current->state = State::done;
    leave_fiber();
  }
}

[[noreturn]] void start(Fiber& fiber) {
  fiber.started = true;
  ucontext_t context{};
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.memory + kGuardPage;
  // Stacks that all began at the same place of a page would compete for the same lines of the cache.
  context.uc_stack.ss_size = kStack - (fiber.block * threads + fiber.thread) % 32 * 128;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
  std::abort();  // setcontext does not return
}

void enter_fiber(Fiber& fiber) {
  current = &fiber;
  threadIdx.x = static_cast<unsigned>(fiber.thread);
  blockIdx.x = first_block_x + static_cast<unsigned>(fiber.block);
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  start(fiber);
}

void wait(State state, Place place) {
  current->state = state;
  current->place = place;
  leave_fiber();
}

// ---- meetings

bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

bool same_place(const Fiber& a, const Fiber& b) {
  return a.state == b.state && a.mask == b.mask && a.place.line == b.place.line &&
         same_text(a.place.file, b.place.file) && same_text(a.place.operation, b.place.operation);
}

// Those who must meet with a waiting fiber, as a range of fibers and a mask within it.
struct Company {
  std::size_t first, count;
  unsigned mask;
  bool has(std::size_t i) const { return count > kWarp || (mask >> i & 1); }
};

Company company_of(std::size_t index) {
  const Fiber& fiber = *fibers[index];
  if (fiber.state == State::in_cluster) return {0, active, ~0u};
  if (fiber.state == State::in_block) return {fiber.block * threads, threads, ~0u};
  const std::size_t warp = fiber.thread / kWarp * kWarp;
  return {fiber.block * threads + warp, kWarp, fiber.mask};
}

// Somebody whom a waiting fiber waits for, or null.
const Fiber* missing_from(std::size_t index) {
  const Company company = company_of(index);
  const std::size_t end_of_block = (fibers[index]->block + 1) * threads;
  for (std::size_t i = 0; i < company.count; ++i) {
    if (!company.has(i)) continue;
    const bool in_warp = fibers[index]->state == State::in_warp;
    if (in_warp && company.first + i >= end_of_block) refuse(describe(*fibers[index]) + ", more than its block has");
    if (!same_place(*fibers[company.first + i], *fibers[index])) return fibers[company.first + i].get();
  }
  return nullptr;
}

void exchange(const Company& company) {
  std::uint64_t brought[kWarp] = {}, everyone = 0;
  for (std::size_t i = 0; i < kWarp; ++i)
    if (company.has(i)) everyone |= brought[i] = fibers[company.first + i]->value;
  for (std::size_t i = 0; i < kWarp; ++i) {
    if (!company.has(i)) continue;
    Fiber& fiber = *fibers[company.first + i];
    if (fiber.source >= 0 && !company.has(static_cast<std::size_t>(fiber.source)))
      refuse(describe(fiber) + " and reads lane " + std::to_string(fiber.source) + ", which is not among them");
    fiber.value = fiber.source < 0 ? everyone : brought[fiber.source];
  }
}

// Lets everybody go on whose meeting is complete; whether anybody may.
bool release() {
  bool any = false;
  for (std::size_t index = 0; index < active; ++index) {
    const State state = fibers[index]->state;
    if (state == State::ready || state == State::done) continue;
    const Company company = company_of(index);
    // The first of a company stands for all; for the others the question is already answered.
    std::size_t first = 0;
    while (!company.has(first)) ++first;
    if (company.first + first != index || missing_from(index)) continue;
    if (state == State::in_warp) exchange(company);
    for (std::size_t i = 0; i < company.count; ++i)
      if (company.has(i)) fibers[company.first + i]->state = State::ready;
    any = true;
  }
  return any;
}

[[noreturn]] void report_deadlock() {
  for (std::size_t index = 0; index < active; ++index)
    if (fibers[index]->state != State::done)
      if (const Fiber* missing = missing_from(index))
        refuse("deadlock: " + describe(*fibers[index]) + ", but " + describe(*missing));
  refuse("deadlock");
}

// ---- blocks

void end_of_thread(const Fiber& fiber) {
  if (--running[fiber.block] != 0) return;
  char* base = shared_base(fiber.block);
  for (std::size_t i = 0; i < kCanary; ++i)
    if (static_cast<unsigned char>(base[shared_used + i]) != kPoison)
      refuse("block " + std::to_string(first_block_x + fiber.block) + " has written beyond its shared memory");
  std::memset(base, kPoison, shared_used);  // nobody may read it any more; the next block finds it so
}

void run_cluster() {
  running.assign(cluster, threads);
  for (std::size_t i = 0; i < active; ++i) fibers[i]->state = State::ready;
  std::size_t left = active;
  while (left != 0) {
    Order order = order_of(active);
    for (std::size_t i = 0; i < active; ++i) {
      Fiber& fiber = *fibers[order.next()];
      if (fiber.state != State::ready) continue;
      enter_fiber(fiber);
      if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
      if (fiber.state != State::done) continue;
      end_of_thread(fiber);
      --left;
    }
    if (!release() && left != 0) report_deadlock();
  }
}

void check(const LaunchShape& shape) {
  if (shape.threads < 1 || shape.threads > 1024) refuse("a block has 1 to 1024 threads");
  if (shape.grid.x > 0x7FFFFFFF || shape.grid.y > 65535 || shape.grid.z > 65535) refuse("the grid is too large");
  if (shape.cluster < 1 || shape.cluster > 8) refuse("a cluster has 1 to 8 blocks");
  if (shape.cluster > 1 && device.major < 9) refuse("this device has no clusters");
  if (shape.grid.x % static_cast<unsigned>(shape.cluster) != 0) refuse("the grid is not a multiple of the cluster");
  if (shape.dynamic_shared_bytes > device.shared_per_block) refuse("a block has more shared memory than the device");
}

void prepare(const LaunchShape& shape) {
  cluster = static_cast<std::size_t>(shape.cluster);
  threads = static_cast<std::size_t>(shape.threads);
  active = cluster * threads;
  while (fibers.size() < active) fibers.push_back(std::make_unique<Fiber>());
  for (std::size_t i = 0; i < active; ++i) {
    fibers[i]->block = i / threads;
    fibers[i]->thread = i % threads;
    fibers[i]->mask = 0;
  }
  statics.clear();
  static_used = 0;
  shared_used = shape.dynamic_shared_bytes;
  lines_per_block = (shared_used + kStaticSharedLimit + kCanary) / sizeof(Line) + 1;
  Line poisoned;
  std::memset(&poisoned, kPoison, sizeof poisoned);
  shared_memory.assign(cluster * lines_per_block, poisoned);
  shuffler.seed(schedule);
}

}  // namespace

// ---- what the kernels see

void meet_block(Place place) { wait(State::in_block, place); }
void meet_cluster(Place place) { wait(State::in_cluster, place); }

std::uint64_t meet_warp(Place place, unsigned mask, std::uint64_t brought, int source) {
  if (!(mask >> lane() & 1)) fail("calls " + std::string(place.operation) + " without being in the mask");
  Fiber& me = *current;
  me.mask = mask;
  me.value = brought;
  me.source = source;
  wait(State::in_warp, place);
  me.mask = 0;
  return me.value;
}

int lane() { return static_cast<int>(threadIdx.x % kWarp); }
unsigned rank_in_cluster() { return static_cast<unsigned>(current->block); }
unsigned blocks_in_cluster() { return static_cast<unsigned>(cluster); }
char* dynamic_shared() { return shared_base(current->block); }

// An object lies at the same place in every block, as cluster_shared() needs.
void* static_shared(const void* key, std::size_t size, std::size_t alignment) {
  for (const StaticShared& object : statics)
    if (object.key == key) return shared_base(current->block) + object.offset;
  if (alignment < 16) alignment = 16;
  const std::size_t offset = (shared_used + alignment - 1) / alignment * alignment;
  static_used += offset + size - shared_used;
  if (static_used > kStaticSharedLimit) fail("has more than 48 KiB of static shared memory");
  if (offset + size > device.shared_per_block) fail("has more shared memory than the device");
  shared_used = offset + size;
  statics.push_back({key, offset});
  return shared_base(current->block) + offset;
}

void* shared_of_rank(void* mine, unsigned rank) {
  char* base = shared_base(current->block);
  char* at = static_cast<char*>(mine);
  if (at < base || at >= base + shared_used) fail("asks for another block's memory by an address that is not shared");
  if (rank >= cluster) fail("asks for the shared memory of a block beyond its cluster");
  if (running[rank] == 0) fail("asks for the shared memory of a block that has ended");
  return shared_base(rank) + (at - base);
}

void fail(const std::string& what) { refuse(name_of(*current) + " " + what); }

void run(const LaunchShape& shape, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> one_grid_at_a_time(mutex);
  check(shape);
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  prepare(shape);
  body = &thread;
  gridDim = shape.grid;
  blockDim = dim3(static_cast<unsigned>(threads));
  const std::size_t columns = shape.grid.x / cluster, rows = std::size_t{shape.grid.y} * shape.grid.z;
  Order order = order_of(columns * rows);
  try {
    for (std::size_t i = 0; i < columns * rows; ++i) {
      const std::size_t at = order.next(), column = at % columns, row = at / columns;
      first_block_x = static_cast<unsigned>(column * cluster);
      blockIdx.y = static_cast<unsigned>(row % shape.grid.y);
      blockIdx.z = static_cast<unsigned>(row / shape.grid.y);
      run_cluster();
    }
  } catch (...) {
    for (const std::unique_ptr<Fiber>& fiber : fibers) fiber->started = false;  // abandoned in mid-air
    throw;
  }
}

void set_device(const DeviceInfo& info) {
  const std::lock_guard<std::mutex> not_during_a_grid(mutex);
  device = info;
}

void set_schedule(std::uint64_t seed) {
  const std::lock_guard<std::mutex> not_during_a_grid(mutex);
  schedule = seed;
}

}  // namespace emulator

DeviceInfo device_info() { return emulator::device; }

}  // namespace moeprune

// What stands around the kernels of a package: threads, the mode of floating point, and the
// functions that TVM's virtual machine and hone's runtime call. The functions of one package are
// generated behind this text (host_code.py) and compiled with it for the package's target.
//
// Each loaded package has threads of its own. One that has not begun its part of a loop loses it
// to the thread that waits: a machine that is busy elsewhere costs time, but holds nobody up.
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
  kMostThreads = 256,
  kLine = 128,           // bytes between data of different threads: two lines, as they are fetched
  kPauses = 1024,        // waits of tens of nanoseconds before others may have the processor
  kPausesPerYield = 64,
};
static const int64_t kSpinNanoseconds = 1000000;  // then a waiting thread sleeps
static const int64_t kNearNanoseconds = 220;      // from one core to a thread that waits on another

// --- the mode of floating point --------------------------------------------------------------
// Denormal numbers take a hundred times as long as others: they are read and written as zeros.

#if defined(__x86_64__)
typedef uint32_t Mode;
static Mode GetMode(void) { return __builtin_ia32_stmxcsr(); }
static void SetMode(Mode mode) { __builtin_ia32_ldmxcsr(mode); }
static const Mode kFlush = 0x8040;  // MXCSR: flush to zero, denormals are zeros
static void Pause(void) { __builtin_ia32_pause(); }
#elif defined(__aarch64__)
typedef uint64_t Mode;
static Mode GetMode(void) {
  Mode mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
static void SetMode(Mode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
static const Mode kFlush = 1 << 24 | 1 << 19;  // FPCR: FZ, and FZ16 where there is one
static void Pause(void) { __asm__ volatile("isb"); }
#endif

static Mode Enter(void) {
  Mode mode = GetMode();
  if ((mode & kFlush) != kFlush) SetMode(mode | kFlush);
  return mode;
}

// Forgets which exceptions were raised since.
static void Leave(Mode mode) { SetMode(mode); }

// --- threads ---------------------------------------------------------------------------------
// tvm/runtime/c_backend_api.h

typedef struct {
  void* sync_handle;
  int32_t num_task;
} Group;
typedef int (*Lambda)(int task, Group* group, void* data);

typedef struct {
  _Alignas(kLine) uint32_t claimed;  // the last loop whose part was taken
  uint32_t done;                     // the last loop whose part is finished
  int32_t processor;                 // where its thread was seen last
  int64_t begun;                     // when the last loop's part was
} Part;

static struct {
  _Alignas(kLine) uint32_t loop;  // number of the current loop; threads sleep on it
  Lambda lambda;
  void* data;
  Group group;
  int32_t status;
  _Alignas(kLine) uint32_t sleepers;
  _Alignas(kLine) uint32_t busy;
  int32_t threads;  // wanted, the calling one included
  int32_t started;  // running, the calling one included; 0 before the first loop
  int32_t stop;
  pthread_t workers[kMostThreads];
  Part parts[kMostThreads];
} pool = {.threads = 1};

#ifndef WATCH_DISTANCE
enum { WATCH_DISTANCE = 0 };
#endif

// How far the cores are from each other, watched where kernels request what later ones read: near
// cores share a cache and its way to memory, far ones have a way each and need no requests.
static struct {
  int64_t announced;  // when the current loop was
  int32_t near, loops;
} distance;

static void Futex(uint32_t* word, int operation, uint32_t value) {
  syscall(SYS_futex, word, operation, value, NULL, NULL, 0);
}

static int64_t Now(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

// Waits a little; counts how often it was called.
static void Wait(uint32_t* count) {
  Pause();
  if (++*count > kPauses && *count % kPausesPerYield == 0) sched_yield();
}

// Only while a loop has a part that nobody has claimed can that part be claimed, and the loop does
// not end before: what a thread reads behind a claim belongs to the loop that it claimed.
static void Work(int index, uint32_t loop) {
  Part* part = &pool.parts[index];
  uint32_t last = __atomic_load_n(&part->claimed, __ATOMIC_RELAXED);
  if (last != loop - 1) return;
  if (!__atomic_compare_exchange_n(&part->claimed, &last, loop, 0, __ATOMIC_ACQ_REL,
                                   __ATOMIC_RELAXED))
    return;
  if (WATCH_DISTANCE) part->begun = Now();
  if (pool.lambda(index, &pool.group, pool.data) != 0)
    __atomic_store_n(&pool.status, -1, __ATOMIC_RELAXED);
  __atomic_store_n(&part->done, loop, __ATOMIC_RELEASE);
}

static void Sleep(uint32_t seen) {
  __atomic_fetch_add(&pool.sleepers, 1, __ATOMIC_SEQ_CST);
  Futex(&pool.loop, FUTEX_WAIT_PRIVATE, seen);
  __atomic_fetch_sub(&pool.sleepers, 1, __ATOMIC_SEQ_CST);
}

// Linux wakes a thread where it ran last, and lets two threads that wait for one another share a
// processor for tens of milliseconds while others are idle: the later one moves away.
static void MoveApart(int index) {
  Part* parts = pool.parts;
  int32_t here = parts[index].processor = sched_getcpu();
  int crowded = 0;
  for (int other = 0; other < index; ++other) crowded |= parts[other].processor == here;
  cpu_set_t allowed, empty;
  if (!crowded || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  empty = allowed;
  for (int other = 0; other < pool.threads; ++other) {
    int32_t processor = parts[other].processor;
    if (processor >= 0 && processor < CPU_SETSIZE) CPU_CLR(processor, &empty);
  }
  if (CPU_COUNT(&empty) == 0) return;
  if (sched_setaffinity(0, sizeof empty, &empty) != 0) return;
  sched_setaffinity(0, sizeof allowed, &allowed);
  parts[index].processor = sched_getcpu();
}

static void* Serve(void* argument) {
  int index = (int)(intptr_t)argument;
  uint32_t seen = pool.loop;  // nothing is launched before all have started
  SetMode(GetMode() | kFlush);
  pthread_setname_np(pthread_self(), "hone");
  __atomic_fetch_add(&pool.started, 1, __ATOMIC_RELEASE);
  for (;;) {
    uint32_t loop, count = 0;
    int64_t until = 0;
    while ((loop = __atomic_load_n(&pool.loop, __ATOMIC_ACQUIRE)) == seen) {
      Wait(&count);
      if (count % kPausesPerYield == 0) MoveApart(index);
      if (count % kPauses != 0) continue;
      if (until == 0) until = Now() + kSpinNanoseconds;
      if (Now() > until) Sleep(seen);
    }
    if (__atomic_load_n(&pool.stop, __ATOMIC_RELAXED)) return NULL;
    seen = loop;
    Work(index, loop);
  }
}

static void Announce(void) {
  __atomic_fetch_add(&pool.loop, 1, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&pool.sleepers, __ATOMIC_SEQ_CST))
    Futex(&pool.loop, FUTEX_WAKE_PRIVATE, INT_MAX);
}

static void Start(void) {
  sigset_t others, before;
  sigfillset(&others);
  // Signals are for the program's own threads, but those that an instruction raises stay here: where
  // one is blocked the kernel ends the process without calling the program's handler.
  sigdelset(&others, SIGSEGV);
  sigdelset(&others, SIGBUS);
  sigdelset(&others, SIGFPE);
  sigdelset(&others, SIGILL);
  pthread_sigmask(SIG_SETMASK, &others, &before);
  int created = 1;
  pool.stop = 0;
  pool.started = 1;
  for (; created < pool.threads; ++created) {
    pool.parts[created].claimed = pool.parts[created].done = pool.loop;
    pool.parts[created].processor = -1;
    if (pthread_create(&pool.workers[created], NULL, Serve, (void*)(intptr_t)created) != 0) break;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pool.parts[0].claimed = pool.parts[0].done = pool.loop;
  pool.threads = created;  // fewer where the system gives no more
  uint32_t count = 0;
  while (__atomic_load_n(&pool.started, __ATOMIC_ACQUIRE) != created) Wait(&count);
}

static void Stop(void) {
  int32_t workers = pool.started;
  pool.started = 0;
  __atomic_store_n(&pool.stop, 1, __ATOMIC_RELAXED);
  Announce();
  for (int index = 1; index < workers; ++index) pthread_join(pool.workers[index], NULL);
}

// Takes the place of TVMBackendParallelLaunch.
static int Launch(Lambda lambda, void* data, int tasks) {
  Group alone = {.num_task = tasks > 0 ? tasks : 1};
  // Looking before taking: threads with slices of their own would send the line back and forth.
  int inside = pool.threads > 1 && (tasks == 0 || tasks == pool.threads) &&
               __atomic_load_n(&pool.busy, __ATOMIC_RELAXED) == 0 &&
               __atomic_exchange_n(&pool.busy, 1, __ATOMIC_ACQUIRE) == 0;
  if (!inside) {  // one thread, a loop inside a loop, or a second thread that runs the model
    int status = 0;
    for (int task = 0; task < alone.num_task; ++task) status |= lambda(task, &alone, data);
    return status;
  }
  if (pool.started == 0) Start();
  pool.lambda = lambda;
  pool.data = data;
  pool.group.num_task = pool.started;
  pool.status = 0;
  pool.parts[0].processor = sched_getcpu();
  uint32_t loop = pool.loop + 1;
  if (WATCH_DISTANCE) distance.announced = Now();
  Announce();
  for (int index = 0; index < pool.started; ++index) Work(index, loop);
  for (int index = 1; index < pool.started; ++index) {
    uint32_t count = 0;
    while (__atomic_load_n(&pool.parts[index].done, __ATOMIC_ACQUIRE) != loop) Wait(&count);
  }
  if (WATCH_DISTANCE && pool.started > 1) {
    distance.near += pool.parts[1].begun - distance.announced < kNearNanoseconds;
    ++distance.loops;
  }
  int status = pool.status;
  __atomic_store_n(&pool.busy, 0, __ATOMIC_RELEASE);
  return status;
}

// Says whether most loops since the last call began on near cores; one says so from the start.
__attribute__((unused)) static int64_t Near(void) {
  int near = 2 * distance.near >= distance.loops;
  distance.near = distance.loops = 0;
  return near;
}

static void Forked(void) {  // in a child process the other threads do not exist
  pool.started = 0;
  pool.sleepers = 0;
  pool.busy = 0;
}

__attribute__((constructor)) static void Load(void) { pthread_atfork(NULL, NULL, Forked); }

__attribute__((destructor)) static void Unload(void) {
  pool.threads = 1;
  if (pool.started > 1) Stop();
}

// --- functions that TVM finds by name --------------------------------------------------------
// tvm/ffi/c_api.h: TVMFFIAny, TVMFFISafeCallType; a tensor's DLTensor follows its object header.

typedef struct {
  int32_t type_index;
  uint32_t padding;
  union {
    int64_t integer;
    void* pointer;
  };
} Any;

typedef struct {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} Tensor;

enum { kInt = 1, kTensorPointer = 7, kTensorObject = 70, kObjectHeader = 24 };

#define EXPORT __attribute__((visibility("default")))
#define KERNEL __attribute__((visibility("hidden")))
#define PACKED(name)                                                                     \
  EXPORT int __tvm_ffi_##name(void* self, const Any* arguments, int32_t count, Any* result); \
  EXPORT int __tvm_ffi_##name(void* self __attribute__((unused)),                        \
                              const Any* arguments __attribute__((unused)),              \
                              int32_t count __attribute__((unused)),                     \
                              Any* result __attribute__((unused)))

__attribute__((unused)) static void* Data(const Any* argument) {
  const char* object = argument->pointer;
  const Tensor* tensor =
      (const Tensor*)(object + (argument->type_index == kTensorPointer ? 0 : kObjectHeader));
  return (char*)tensor->data + tensor->byte_offset;
}

__attribute__((unused)) static char nothing[kLine];

__attribute__((unused)) static int Integer(Any* result, int64_t value) {
  result->type_index = kInt;
  result->padding = 0;
  result->integer = value;
  return 0;
}

// Where generated code looks for TVM's threads; absent where no kernel asks for any.
extern __attribute__((weak)) void* __TVMBackendParallelLaunch;

// hone_threads(count): run on so many threads, the calling one included.
PACKED(hone_threads) {
  int64_t wanted = arguments[0].integer;
  int32_t threads = wanted < 1 ? 1 : wanted > kMostThreads ? kMostThreads : (int32_t)wanted;
  if (pool.started > 1 && threads != pool.started) Stop();
  pool.started = pool.started == threads ? threads : 0;
  pool.threads = threads;
  if (&__TVMBackendParallelLaunch != NULL) __TVMBackendParallelLaunch = (void*)Launch;
  return 0;
}

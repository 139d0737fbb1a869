// What a CPU build of torch lacks for the extension, and what tests set, through ctypes.

#include <cuda_runtime.h>

#include "../../csrc/split_plan.h"

extern "C" int aoti_torch_get_current_cuda_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}

// The order in which threads and blocks run: 0 is ascending, any other number a random one.
extern "C" void cuda_on_cpu_order(unsigned seed) { cuda_on_cpu::settings.seed = seed; }

extern "C" void cuda_on_cpu_processors(int count) { cuda_on_cpu::settings.processors = count; }

extern "C" void cuda_on_cpu_shared_memory(int bytes) { cuda_on_cpu::settings.shared = bytes; }

extern "C" void cuda_on_cpu_refuse_launches(bool refuse) { cuda_on_cpu::settings.refuses = refuse; }

// What torch would find when it asks behind its own next launch.
extern "C" int cuda_on_cpu_last_error() { return cudaGetLastError(); }

extern "C" int cuda_on_cpu_reductions() { return cuda_on_cpu::reductions; }

// tiles_per_part of csrc/split_plan.h.
extern "C" long long split_plan(
    const long long* tiles, int heads, long long parallel, long long resident) {
  return attnvariants::tiles_per_part({tiles, tiles + heads}, parallel, resident);
}

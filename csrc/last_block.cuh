// Which of several blocks comes last, so that it can work on what all of them have left.

#pragma once

#include <cuda_runtime.h>

namespace attnvariants {

// True in all threads of the block that is the last of `expected` to get here. What the others
// wrote before is then visible, through __ldcg: L1 is not coherent. What they read has been read.
//
// The counter is 0 again afterwards, so that the same launch can be replayed by a CUDA graph.
__device__ __forceinline__ bool is_last_block(unsigned* counter, unsigned expected) {
  __shared__ bool last;
  __threadfence();  // this thread's accesses come before the arrival below
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1u) + 1u == expected;
    if (last) *counter = 0u;
  }
  __syncthreads();
  const bool result = last;
  if (result) __threadfence();  // and the others' accesses before those that follow
  return result;
}

}  // namespace attnvariants

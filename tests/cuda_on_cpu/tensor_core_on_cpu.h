// The functions of csrc/tensor_core.cuh for a CPU. Fragments are laid out as the PTX ISA has it.

#pragma once

#include <cmath>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace cuda_on_cpu {

// Sums of tensor cores are cut off, not rounded to nearest: a bias that long sums would show.
inline float cut_off(double x) {
  const float y = static_cast<float>(x);
  return std::fabs(static_cast<double>(y)) > std::fabs(x) ? std::nextafterf(y, 0.0f) : y;
}

struct Operands {
  uint32_t a[4], b[2];
};

inline float element_of(const uint32_t* registers, int index, __nv_bfloat16) {
  __nv_bfloat16 x;
  std::memcpy(&x, reinterpret_cast<const char*>(registers) + 2 * index, sizeof x);
  return __bfloat162float(x);
}
inline float element_of(const uint32_t* registers, int index, __half) {
  __half x;
  std::memcpy(&x, reinterpret_cast<const char*>(registers) + 2 * index, sizeof x);
  return __half2float(x);
}
inline float element_of(const uint32_t* registers, int index, float) {
  const uint32_t bits = registers[index] & 0xffffe000u;  // TF32 numbers have no other bits
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// [16, 8] += [16, kDepth] [kDepth, 8]. The lanes' fragments are put together once per warp; then
// every lane computes its four elements.
template <typename T, int kDepth>
void multiply(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file,
              int line) {
  Operands operands;
  std::memcpy(operands.a, a, sizeof a);
  std::memcpy(operands.b, b, sizeof b);
  const Meeting warp = meet(operands, file, line);
  WarpMatrices& m = warp.matrices();
  constexpr int kPerRegister = 4 / sizeof(T);
  if (warp.is_first(m)) {
    for (int lane = 0; lane < kWarp; ++lane) {
      const Operands from = warp.template offered<Operands>(lane);
      const int group = lane / 4, within = lane % 4;
      for (int r = 0; r < 4; ++r) {
        for (int i = 0; i < kPerRegister; ++i) {
          const int row = group + 8 * (r % 2);
          const int col = within * kPerRegister + i + kDepth / 2 * (r / 2);
          m.a[row][col] = element_of(from.a, r * kPerRegister + i, T());
        }
      }
      for (int r = 0; r < 2; ++r) {
        for (int i = 0; i < kPerRegister; ++i) {
          const int row = within * kPerRegister + i + kDepth / 2 * r;
          m.b[group][row] = element_of(from.b, r * kPerRegister + i, T());
        }
      }
    }
  }
  for (int e = 0; e < 4; ++e) {
    const double* row = m.a[warp.lane() / 4 + 8 * (e / 2)];
    const double* col = m.b[warp.lane() % 4 * 2 + e % 2];
    double sum = acc[e];
    for (int k = 0; k < kDepth; ++k) sum += row[k] * col[k];
    acc[e] = cut_off(sum);
  }
}

struct MatrixRow {
  uint16_t x[8];
};

// Every lane's row is read before the lanes meet: what others write meanwhile without a barrier is
// missing.
inline void load(uint32_t (&x)[4], const void* row, bool transposed, const char* file, int line) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) abort_with("ldmatrix off 16 bytes", file, line);
  MatrixRow own;
  std::memcpy(&own, row, sizeof own);
  const Meeting warp = meet(own, file, line);
  const int slow = warp.lane() / 4, fast = warp.lane() % 4 * 2;
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int from = transposed ? fast + i : slow, element = transposed ? slow : fast + i;
      pair[i] = warp.template offered<MatrixRow>(8 * m + from).x[element];
    }
    std::memcpy(&x[m], pair, sizeof pair);
  }
}

}  // namespace cuda_on_cpu

namespace attnvariants {

template <typename T>
void mma(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 2);
  cuda_on_cpu::multiply<T, 16>(acc, a, b, file, line);
}

inline void mma_tf32(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::multiply<float, 8>(acc, a, b, file, line);
}

inline uint32_t round_to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return x != x ? bits : (bits + 0x1000u) & 0xffffe000u;
}

inline void load_matrices(uint32_t (&x)[4], const void* row,
                          const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::load(x, row, false, file, line);
}

inline void load_matrices_transposed(
    uint32_t (&x)[4], const void* row, const char* file = __builtin_FILE(),
    int line = __builtin_LINE()) {
  cuda_on_cpu::load(x, row, true, file, line);
}

inline void copy_async(void* shared, const void* global, bool live) {
  cuda_on_cpu::start_copy(shared, live ? global : nullptr);
}

inline void commit_copies() { cuda_on_cpu::commit_copies(); }

template <int kPending>
void wait_for_copies() {
  cuda_on_cpu::finish_copies(kPending);
}

inline float fast_exp2(float x) { return exp2f(x); }

}  // namespace attnvariants

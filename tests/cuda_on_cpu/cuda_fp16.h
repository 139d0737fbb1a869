// float16 for g++.

#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  _Float16 y;
  std::memcpy(&y, &x.bits, sizeof y);
  return static_cast<float>(y);
}

inline __half __float2half(float x) {
  const _Float16 y = static_cast<_Float16>(x);
  __half z;
  std::memcpy(&z.bits, &y, sizeof y);
  return z;
}

struct __half2 {
  __half x, y;
};

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }

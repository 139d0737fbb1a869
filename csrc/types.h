// What host and device code both say about a call.

#pragma once

#include <cstdint>

namespace attnvariants {

enum class Dtype : int { kFloat32, kFloat16, kBFloat16 };

// Gates of softmax attention.
enum class Gate : int { kNone, kSigmoid, kNsSigmoid, kSoftplus };

// Feature maps of linear attention, and activations of its gates.
enum class Map : int { kIdentity, kEluPlusOne, kElu, kRelu, kSilu, kSigmoid };

// RMSNorm over a head or over all heads.
enum class Norm : int { kNone, kHead, kModel };

// In elements, of a tensor with contiguous rows.
struct Strides {
  int64_t batch, time, head;
};

inline constexpr int kRun = 8;  // neighbouring elements of a row that one thread holds

}  // namespace attnvariants

// Tiles of the attention kernels for each padded head_dim: chosen so that nothing spills at 255 registers a thread, and
// that one slot (forward: two) fits the 99 KiB of shared memory that sm_86, sm_89 and sm_120 give a block. How many
// slots hold data under way is decided at launch from what the device has.
#pragma once

namespace herdkern::cuda {

// kRowTiles: tiles of 16 rows that a warp owns. Two halve the traffic from shared memory: each right operand is read
// for 32 rows.
template <int kDim>
struct ForwardSizes {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kDim <= 128 ? 2 : 1;
  static constexpr int kRows = 16 * kRowTiles * kWarps;
  static constexpr int kKeys = kDim <= 128 ? 64 : 32;
  static constexpr int kQueryBytes = 2 * kRows * kDim;
  static constexpr int kSlotBytes = 2 * kKeys * kDim;  // K or V of a block of keys
  static constexpr int kMinSlots = 2, kMaxSlots = 4;
};

template <int kDim>
struct QueryGradientSizes {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kRowTiles = ForwardSizes<kDim>::kRowTiles;
  static constexpr int kRows = ForwardSizes<kDim>::kRows;  // one list of tiles serves both passes
  static constexpr int kKeys = kDim == 64 ? 64 : kDim == 256 ? 16 : 32;
  static constexpr int kQueryBytes = 4 * kRows * kDim + 8 * kRows;  // Q, dO, two numbers a row
  static constexpr int kSlotBytes = 4 * kKeys * kDim;               // K and V of a block of keys
  static constexpr int kMinSlots = 1, kMaxSlots = 3;
};

// kSplit warps share their keys: each computes the scores of a part of the queries, and sums a part of the columns.
template <int kDim>
struct KeyGradientSizes {
  static constexpr int kWarps = kDim == 128 || kDim == 96 ? 8 : 4, kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kDim == 64 ? 2 : 1;
  static constexpr int kSplit = kDim == 256 ? 2 : 1;
  static constexpr int kKeys = 16 * kRowTiles * kWarps / kSplit;
  static constexpr int kOwnRows = kKeys / kWarps;  // rows of dK and dV that a warp writes out
  static constexpr int kRows = kDim <= 96 ? 64 : 32;
  static constexpr int kStep = kDim == 64 ? 16 : kRows;  // rows whose scores are in registers together
  static constexpr int kExchangeBytes = kSplit == 1 ? 0 : 4 * kKeys * kRows;  // P and dS
  static constexpr int kKeyBytes = 4 * kKeys * kDim + kExchangeBytes;         // K, V
  static constexpr int kSlotBytes = 4 * kRows * kDim + 8 * kRows;             // Q, dO, two numbers a row
  static constexpr int kMinSlots = 1, kMaxSlots = 3;
};

}  // namespace herdkern::cuda

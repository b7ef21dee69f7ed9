// The merges behind a vocabulary that lists only its tokens. Tokens come in the order in which they were learnt; the
// merge of a token is what greedy BPE leaves of it when only earlier tokens may be used: exactly two parts, else the
// token was not learnt by a merge. A unit is a byte, or a UTF-8 character; single units are there from the start,
// wherever they stand in the order. O(n log n) for a token of n units, without a table of pairs: the parts of a token
// are looked up by hashes of its prefixes.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

namespace herdkern::text {

enum class MergeUnit { kByte, kCharacter };

struct RecoveredMerges {
  std::vector<uint32_t> pairs;      // (2 * tokens,) places of the two parts in `tokens`; kNoToken twice if it has none,
                                    // kNoToken for a part that is a unit without a token
  std::vector<uint32_t> num_parts;  // (tokens,) 1 for a single unit, 2 for a merge
};

// The views must be different and not empty; the caller checks.
RecoveredMerges recover_merges(const std::vector<std::string_view>& tokens, MergeUnit unit);

}  // namespace herdkern::text

// Merging within short words: the table, the kernel for any processor, and the choice among the levels.
#define HK_MERGE_LEVEL baseline
#include "text/bpe_word_merge_kernel.h"
#include "text/isa_level.h"

namespace herdkern::text {

// A quarter to a half of the slots is in use: one token in fifty has no place in its bucket.
MergeTable::MergeTable(const std::vector<TokenParts>& parts, const ByteTokens& bytes) : bytes_(&bytes) {
  const auto is_here = [&](size_t id) { return parts[id].left != kNoToken; };
  size_t num_tokens = 0;
  for (size_t id = 0; id < parts.size(); ++id) num_tokens += is_here(id);
  int bits = 4;
  while ((size_t(1) << bits) * kSlots / 2 < num_tokens) ++bits;
  buckets_ = HugeArray<Bucket>(size_t(1) << bits);
  shift_ = 64 - bits;
  filter_ = HugeArray<uint64_t>(size_t(1) << (bits - 2));  // 16 bits a bucket
  filter_shift_ = 64 - (bits + 4);
  for (size_t id = 0; id < parts.size(); ++id) {
    if (!is_here(id)) continue;
    const uint64_t key = key_of(parts[id].left, parts[id].right), hash = hash_of(key);
    filter_[hash >> filter_shift_ >> 6] |= uint64_t(1) << (hash >> filter_shift_ & 63);
    size_t i = hash >> shift_, slot = 0;
    while (buckets_[i].slots[slot] != 0) {
      if (++slot < kSlots) continue;
      slot = 0;
      i = (i + 1) & (buckets_.size() - 1);
    }
    buckets_[i].slots[slot] = key << kIdBits | id;
  }
}

uint32_t MergeTable::find(uint64_t key) const {
  for (size_t i = hash_of(key) >> shift_;; i = (i + 1) & (buckets_.size() - 1)) {
    for (const uint64_t slot : buckets_[i].slots) {
      if (slot == 0) return kNoToken;
      if (slot >> kIdBits == key) return uint32_t(slot & kIdMask);
    }
  }
}

MergeWord find_merge_word() {
#if defined(HK_X86)
  const IsaLevel level = isa_level();
  if (level >= IsaLevel::kAvx512) return avx512::merge_word;
  if (level >= IsaLevel::kAvx2) return avx2::merge_word;
#endif
  return baseline::merge_word;
}

}  // namespace herdkern::text

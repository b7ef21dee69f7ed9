// Where an encoder's ids go.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "text/bpe_word_cache.h"
#include "text/id_buffer.h"

namespace herdkern::text {

// Into an array...
class IdSink {
 public:
  explicit IdSink(IdBuffer& ids) : ids_(ids) {}

  // Adds what entries hold; in registers, so nothing else may be added to the sink meanwhile.
  class Run {
   public:
    Run(IdSink& sink, size_t max_entries) : begin_(sink.ids_.room_for(4 * max_entries)), at_(begin_), sink_(sink) {}
    void add(const WordCache::Entry& entry) {
      static_assert(sizeof(entry.ids) + sizeof(entry.num_and_flags) == 16);
      std::memcpy(at_, entry.ids, 16);  // a fixed size is quicker than the right one
      at_ += entry.num_ids();
    }
    void close() { sink_.ids_.grow_by(size_t(at_ - begin_)); }

   private:
    uint32_t *begin_, *at_;
    IdSink& sink_;
  };

  void add(const void* ids, size_t num_ids) {
    std::memcpy(ids_.room_for(num_ids), ids, num_ids * sizeof(uint32_t));
    ids_.grow_by(num_ids);
  }
  void push(uint32_t id) { ids_.push(id); }
  // A new word's ids are appended to this buffer, then taken note of.
  IdBuffer& buffer() { return ids_; }
  void note(size_t) {}
  size_t size() const { return ids_.size(); }

 private:
  IdBuffer& ids_;
};

// ... or only their number.
class CountSink {
 public:
  class Run {
   public:
    Run(CountSink& sink, size_t) : sink_(sink) {}
    void add(const WordCache::Entry& entry) { num_ids_ += entry.num_ids(); }
    void close() { sink_.total_ += num_ids_; }

   private:
    size_t num_ids_ = 0;
    CountSink& sink_;
  };

  void add(const void*, size_t num_ids) { total_ += num_ids; }
  void push(uint32_t) { ++total_; }
  IdBuffer& buffer() {
    scratch_.clear();
    return scratch_;
  }
  void note(size_t num_ids) { total_ += num_ids; }
  size_t size() const { return total_; }

 private:
  size_t total_ = 0;
  IdBuffer scratch_;
};

}  // namespace herdkern::text

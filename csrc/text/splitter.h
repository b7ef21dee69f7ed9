// Cutting a document into the words that BPE works on, by a split pattern.
//
// A Splitter stands for one pattern, or for a sequence of patterns of which each cuts the words of the one before (the
// "Sequence" of "Split" with behaviour "Isolated" of Hugging Face's tokenizer.json). It finds what the `regex` package
// of Python finds in text decoded with "surrogateescape": a byte that is no part of well-formed UTF-8 counts as one
// code point. Text between two matches is a word too, so words always cover the document.
// A Splitter never changes: threads share it. A Cursor belongs to one thread and one document.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace herdkern::text {

class Splitter {
 public:
  // What a cursor carries from one batch of words to the next, for splitters that need more than a place.
  struct State {
    virtual ~State() = default;
    virtual void forget() = 0;  // before another document
  };
  class Cursor;

  // "llama3" (also "cl100k"), "o200k", "gpt2", "qwen2", "deepseek3". Throws std::invalid_argument for another name.
  static std::shared_ptr<const Splitter> named(std::string_view name);
  // One pattern or a sequence; those of a name get its fast scanner. Throws std::invalid_argument for a pattern that
  // cannot be matched in linear time, with the construct and its place.
  static std::shared_ptr<const Splitter> from_patterns(const std::vector<std::string>& patterns);
  // (name, patterns) of every name.
  static const std::vector<std::pair<std::string, std::vector<std::string>>>& all_named();

  virtual ~Splitter() = default;

  inline Cursor cursor(const uint8_t* begin, const uint8_t* end) const;
  // f(scanner), where scanner.cursor(begin, end).next() gives words; one scanner serves every pattern, because a batch
  // of words costs one virtual call.
  template <typename F>
  decltype(auto) visit(F&& f) const {
    return std::forward<F>(f)(*this);
  }
  // Whether the words from a border on depend on the text behind it alone, so that Cursor::start_at may be used.
  virtual bool begins_anywhere() const { return true; }
  const std::vector<std::string>& patterns() const { return patterns_; }
  const std::string& name() const { return name_; }  // empty for a pattern without a name

 protected:
  static constexpr size_t kBatch = 128;  // words; a batch of pointers is 1 KiB

  struct Progress {
    const uint8_t *begin, *place, *end;  // the document, and up to where it is cut
    std::unique_ptr<State> state;        // empty at first
    uint64_t num_steps = 0;              // work done, about one a byte
  };
  // Writes the ends of the next words, at least one and at most kBatch, and moves the place to the last of them.
  // place < end.
  virtual size_t fill(Progress& progress, const uint8_t** ends) const = 0;

 private:
  std::string name_;
  std::vector<std::string> patterns_;
};

// Gives the words of one document. The splitter must outlive it.
class Splitter::Cursor {
 public:
  Cursor(const Splitter& splitter, const uint8_t* begin, const uint8_t* end)
      : splitter_(&splitter), progress_{begin, begin, end, nullptr, 0} {}

  // The end of the word that starts where the last one ended, or null at the end of the document.
  const uint8_t* next() {
    if (next_ == num_ends_) {
      if (progress_.place == progress_.end) return nullptr;
      num_ends_ = splitter_->fill(progress_, ends_);
      next_ = 0;
    }
    return ends_[next_++];
  }

  // Goes on at a place where a word begins, or at any other as if one began there. Before the first word.
  void start_at(const uint8_t* place) { progress_.place = place; }

  // Starts over with another document.
  void reset(const uint8_t* begin, const uint8_t* end) {
    progress_.begin = progress_.place = begin;
    progress_.end = end;
    if (progress_.state) progress_.state->forget();
    next_ = num_ends_ = 0;
  }
  // The work done so far, about one step a byte: what tests of linear time count.
  uint64_t num_steps() const { return progress_.num_steps; }

 private:
  const Splitter* splitter_;
  Progress progress_;
  size_t next_ = 0, num_ends_ = 0;
  const uint8_t* ends_[kBatch];
};

Splitter::Cursor Splitter::cursor(const uint8_t* begin, const uint8_t* end) const { return Cursor(*this, begin, end); }

}  // namespace herdkern::text

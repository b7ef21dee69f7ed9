// Files of records of one size, read and written through buffers. A file is opened for each refill and each flush only:
// thousands of them may be in use at once, and the limit of open files never matters.
#pragma once
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "text/word_runs.h"

namespace herdkern::text {

// Bytes appended to a file that is made empty at first.
class AppendFile {
 public:
  AppendFile(std::string path, size_t buffer_bytes) : path_(std::move(path)), buffer_bytes_(buffer_bytes) {
    const int descriptor = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (descriptor < 0) throw FileError(errno, path_);
    ::close(descriptor);
  }

  void add(const void* data, size_t size) {
    if (buffer_.size() + size > buffer_bytes_) flush();
    const auto* bytes = static_cast<const char*>(data);
    if (size >= buffer_bytes_) {
      write(bytes, size);
    } else {
      if (buffer_.capacity() == 0) buffer_.reserve(buffer_bytes_);
      buffer_.insert(buffer_.end(), bytes, bytes + size);
    }
  }
  template <typename T>
  void add_record(const T& record) {
    static_assert(std::is_trivially_copyable_v<T>);
    add(&record, sizeof(T));
  }
  void flush() {
    if (!buffer_.empty()) write(buffer_.data(), buffer_.size());
    buffer_.clear();
  }
  void finish() {
    flush();
    std::vector<char>().swap(buffer_);
  }
  uint64_t size() const { return written_ + buffer_.size(); }
  const std::string& path() const { return path_; }

 private:
  void write(const char* data, size_t size) {
    const int descriptor = ::open(path_.c_str(), O_WRONLY | O_CLOEXEC);
    if (descriptor < 0) throw FileError(errno, path_);
    File(descriptor, true, path_).write_at(written_, data, size);
    written_ += size;
  }
  std::string path_;
  size_t buffer_bytes_;
  uint64_t written_ = 0;
  std::vector<char> buffer_;
};

inline uint64_t file_bytes(const std::string& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) throw FileError(errno, path);
  const File file(descriptor, true, path);
  const off_t size = ::lseek(descriptor, 0, SEEK_END);
  if (size < 0) throw FileError(errno, path);
  return static_cast<uint64_t>(size);
}

// The number of records in a file. Throws std::invalid_argument if it does not hold whole ones.
template <typename T>
uint64_t count_records(const std::string& path) {
  const uint64_t size = file_bytes(path);
  if (size % sizeof(T) != 0) throw std::invalid_argument(path + " is damaged: it ends within a record");
  return size / sizeof(T);
}

// Records [begin, end) of a file, one after the other.
template <typename T>
class RecordReader {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  RecordReader(std::string path, uint64_t begin, uint64_t end, size_t buffer_records)
      : path_(std::move(path)), place_(begin), end_(end), buffer_records_(std::max<size_t>(1, buffer_records)) {}
  RecordReader(const std::string& path, size_t buffer_records)
      : RecordReader(path, 0, count_records<T>(path), buffer_records) {}

  // The record that is next, null at the end.
  const T* peek() {
    if (next_ == buffer_.size() && !refill()) return nullptr;
    return &buffer_[next_];
  }
  void skip() { ++next_; }
  const T* take() {
    const T* record = peek();
    if (record) ++next_;
    return record;
  }

 private:
  bool refill() {
    if (place_ >= end_) {
      std::vector<T>().swap(buffer_);
      next_ = 0;
      return false;
    }
    buffer_.resize(static_cast<size_t>(std::min<uint64_t>(buffer_records_, end_ - place_)));
    File::open(path_)->read_at(place_ * sizeof(T), buffer_.data(), buffer_.size() * sizeof(T));
    place_ += buffer_.size();
    next_ = 0;
    return true;
  }
  std::string path_;
  uint64_t place_, end_;
  size_t buffer_records_, next_ = 0;
  std::vector<T> buffer_;
};

// Merges sorted readers into one ascending sequence; of equal records, that of the earlier reader comes first.
// A tree of losers: one comparison a level and record.
template <typename T>
class Merge {
 public:
  explicit Merge(std::vector<RecordReader<T>> readers) : readers_(std::move(readers)) {
    while (leaves_ < readers_.size()) leaves_ *= 2;
    heads_.assign(leaves_, nullptr);
    for (size_t i = 0; i < readers_.size(); ++i) heads_[i] = readers_[i].peek();
    losers_.assign(leaves_, 0);
    winner_ = leaves_ == 1 ? 0 : build(1);
  }

  // The smallest record that is left, null at the end; it is valid until the next call of skip.
  const T* peek() const { return heads_[winner_]; }
  size_t source() const { return winner_; }
  void skip() {
    readers_[winner_].skip();
    heads_[winner_] = readers_[winner_].peek();
    for (size_t node = (winner_ + leaves_) / 2; node >= 1; node /= 2)
      if (is_before(losers_[node], winner_)) std::swap(losers_[node], winner_);
  }

 private:
  bool is_before(size_t a, size_t b) const {
    if (!heads_[a] || !heads_[b]) return heads_[a] != nullptr;
    if (*heads_[a] < *heads_[b]) return true;
    return !(*heads_[b] < *heads_[a]) && a < b;
  }
  size_t build(size_t node) {
    if (node >= leaves_) return node - leaves_;
    const size_t left = build(2 * node), right = build(2 * node + 1);
    const bool right_wins = is_before(right, left);
    losers_[node] = right_wins ? left : right;
    return right_wins ? right : left;
  }
  std::vector<RecordReader<T>> readers_;
  std::vector<const T*> heads_;
  std::vector<size_t> losers_;
  size_t leaves_ = 1, winner_ = 0;
};

// Records in a file without a name (in `folder`): added at the end, then read from the start. Few stay in memory.
template <typename T>
class Spool {
 public:
  explicit Spool(size_t buffer_records) : buffer_records_(std::max<size_t>(1, buffer_records)) {}
  void add(const T& record, const std::string& folder) {
    if (buffer_.size() == buffer_records_) flush(folder);
    buffer_.push_back(record);
  }
  bool is_empty() const { return written_ == 0 && buffer_.empty(); }
  template <typename Use>
  void for_each(Use&& use) {
    std::vector<T> read;
    for (uint64_t place = 0; place < written_; place += read.size()) {
      read.resize(static_cast<size_t>(std::min<uint64_t>(buffer_records_, written_ - place)));
      file_->read_at(place * sizeof(T), read.data(), read.size() * sizeof(T));
      for (const T& record : read) use(record);
    }
    for (const T& record : buffer_) use(record);
  }
  void clear() {
    file_.reset();
    written_ = 0;
    std::vector<T>().swap(buffer_);
  }

 private:
  void flush(const std::string& folder) {
    if (!file_) file_ = File::unnamed(folder);
    file_->write_at(written_ * sizeof(T), buffer_.data(), buffer_.size() * sizeof(T));
    written_ += buffer_.size();
    buffer_.clear();
  }
  std::shared_ptr<const File> file_;
  uint64_t written_ = 0;
  size_t buffer_records_;
  std::vector<T> buffer_;
};

}  // namespace herdkern::text

// Takes marked lines out of texts, and keeps a list of the most frequent ones that went.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace herdkern::text {

// The `limit` removed lines that are most frequent, of equally frequent ones those that sort first by their bytes; of
// lines with one key the form that sorts first stands for all. What cannot be among them is forgotten at once.
class RemovedLines {
 public:
  explicit RemovedLines(int64_t limit) : limit_(limit) {}
  void note(uint64_t key, uint64_t count, std::string_view line);
  std::vector<std::pair<uint64_t, std::string>> entries() const;  // (count, line), most frequent first

 private:
  using Entry = std::pair<uint64_t, std::string>;
  static bool before(const Entry& a, const Entry& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  }
  void forget_the_rest();

  int64_t limit_;
  std::unordered_map<uint64_t, Entry> best_;  // by key
  Entry last_{0, ""};                         // nothing behind it can be among them, once it is set
  bool is_full_ = false;
};

bool is_blank(std::string_view text);  // as Python's str.isspace has it; also if it is empty

// What went of one text.
struct LineRemoval {
  int64_t num_removed = 0;
  std::string text;  // set if a line went
};

// counts: one per line of the text (cut at '\n'), 0 for a line that stays.  keys: what makes lines one in the list.
// With code_aware lines that look like code, formulas or rows of tables stay. Blank lines at a gap close up: those
// behind it go if a blank line or nothing stands before it, and those before it if nothing follows.
LineRemoval remove_lines(std::string_view text, const uint64_t* counts, const uint64_t* keys, bool code_aware,
                         RemovedLines& removed);

}  // namespace herdkern::text

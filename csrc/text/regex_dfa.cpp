// From a parsed pattern to its automaton: see regex_dfa.h.
#include "text/regex_dfa.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>

#include "text/regex_parse.h"

namespace herdkern::text {

namespace {

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("must be a pattern that can be matched in one pass, got one that " + what);
}

// One place in the pattern: what it wants, and where it goes on.
struct Place {
  enum Kind : uint8_t { kSet, kLook, kTextStart, kFork, kMatch } kind;
  uint32_t set = 0;  // of kSet and kLook: index into sets
  bool at_end = false;
  uint32_t next = 0, other = 0;  // kFork tries next first
};

// The pattern as places, made from its end to its start: every part is compiled with the place behind it known.
class Program {
 public:
  explicit Program(const RegexNode& root) {
    places.push_back({Place::kMatch});
    start = compile(root, 0);
  }

  std::vector<Place> places;
  std::vector<CodePointSet> sets;
  uint32_t start = 0;

 private:
  static constexpr size_t kMaxPlaces = 50000, kMaxSets = 2000;
  size_t num_compiled_ = 0;

  uint32_t add(Place place) {
    if (places.size() == kMaxPlaces)
      refuse("has more than " + std::to_string(kMaxPlaces) + " parts, repeats written out");
    places.push_back(place);
    return uint32_t(places.size() - 1);
  }
  uint32_t set_index(const CodePointSet& set) {
    const auto found = std::find(sets.begin(), sets.end(), set);
    if (found != sets.end()) return uint32_t(found - sets.begin());
    if (sets.size() == kMaxSets) refuse("has more than " + std::to_string(kMaxSets) + " different classes");
    sets.push_back(set);
    return uint32_t(sets.size() - 1);
  }

  uint32_t compile(const RegexNode& node, uint32_t next) {
    if (++num_compiled_ > kMaxPlaces) {  // every call adds at most two places
      refuse("has more than " + std::to_string(kMaxPlaces) + " parts, repeats written out");
    }
    switch (node.kind) {
      case RegexNode::kEmpty:
        return next;
      case RegexNode::kSet:
        return add({Place::kSet, set_index(node.set), false, next});
      case RegexNode::kLook:
        return add({Place::kLook, set_index(node.set), node.at_end, next});
      case RegexNode::kTextStart:
        return add({Place::kTextStart, 0, false, next});
      case RegexNode::kConcat:
        for (size_t i = node.children.size(); i-- > 0;) next = compile(*node.children[i], next);
        return next;
      case RegexNode::kAlternate: {
        uint32_t entry = compile(*node.children.back(), next);
        for (size_t i = node.children.size() - 1; i-- > 0;) {
          const uint32_t first = compile(*node.children[i], next);
          entry = add({Place::kFork, 0, false, first, entry});
        }
        return entry;
      }
      case RegexNode::kRepeat:
        return compile_repeat(node, next);
    }
    return next;
  }

  uint32_t compile_repeat(const RegexNode& node, uint32_t next) {
    const RegexNode& child = *node.children[0];
    uint32_t out = next;  // where it goes when it could take more but does not
    if (node.greed == RegexNode::kPossessive) {
      out = add({Place::kLook, set_index(child.set.complement()), true, next});
    }
    const auto fork = [&](uint32_t in) {
      return node.greed == RegexNode::kLazy ? Place{Place::kFork, 0, false, out, in}
                                            : Place{Place::kFork, 0, false, in, out};
    };
    uint32_t entry = next;
    if (node.max == RegexNode::kNoMax) {
      entry = add({Place::kFork});
      const uint32_t in = compile(child, entry);
      places[entry] = fork(in);
    } else {
      for (int i = node.min; i < node.max; ++i) {
        const Place optional = fork(compile(child, entry));
        entry = add(optional);
      }
    }
    for (int i = 0; i < node.min; ++i) entry = compile(child, entry);
    return entry;
  }
};

}  // namespace

struct RegexDfa::Builder {
  Builder(RegexDfa& own, const Program& program) : dfa(own), program(program), seen(program.places.size(), 0) {}

  // Gives code points that every set of the program treats alike one class.
  void make_classes() {
    const size_t num_sets = program.sets.size();
    std::vector<uint32_t> borders = {0};
    for (const CodePointSet& set : program.sets) {
      for (const auto& range : set.ranges()) {
        borders.push_back(range.first);
        borders.push_back(range.last + 1);
      }
    }
    std::sort(borders.begin(), borders.end());
    borders.erase(std::unique(borders.begin(), borders.end()), borders.end());
    if (borders.back() != kNumCodePoints) borders.push_back(kNumCodePoints);
    std::map<std::vector<bool>, uint8_t> class_of;
    std::vector<uint8_t> flat(kNumCodePoints);
    std::vector<size_t> range_of(num_sets, 0);
    for (size_t i = 0; i + 1 < borders.size(); ++i) {
      std::vector<bool> within(num_sets);
      for (size_t s = 0; s < num_sets; ++s) {
        const auto& ranges = program.sets[s].ranges();
        while (range_of[s] < ranges.size() && ranges[range_of[s]].last < borders[i]) ++range_of[s];
        within[s] = range_of[s] < ranges.size() && ranges[range_of[s]].first <= borders[i];
      }
      const auto [found, is_new] = class_of.try_emplace(within, uint8_t(class_of.size()));
      if (is_new && class_of.size() > kMaxClasses) refuse("tells more than 255 classes of code points apart");
      if (is_new) members.push_back(within);
      std::fill(flat.begin() + borders[i], flat.begin() + borders[i + 1], found->second);
    }
    dfa.num_classes_ = uint32_t(members.size());
    dfa.stride_ = dfa.num_classes_ + 1;
    std::copy(flat.begin(), flat.begin() + 128, dfa.ascii_class_);
    std::map<std::vector<uint8_t>, uint16_t> pages;
    for (uint32_t c = 0; c < kNumCodePoints; c += 1u << kPageBits) {
      std::vector<uint8_t> page(flat.begin() + c, flat.begin() + c + (1u << kPageBits));
      const auto [found, is_new] = pages.try_emplace(page, uint16_t(pages.size()));
      if (is_new) dfa.classes_.insert(dfa.classes_.end(), page.begin(), page.end());
      dfa.page_of_.push_back(found->second);
    }
  }

  bool in_class(uint32_t set, uint32_t cls) const { return members[cls][set]; }

  // Appends the places reachable from `place` without reading to `list`, preferred ones first. With a class (or the end
  // of the text) in hand lookahead is decided, without (kUnknown) it stays in the list. Returns true at a match: what
  // comes after it counts for nothing.
  static constexpr uint32_t kUnknown = ~0u;
  bool follow(uint32_t from, uint32_t cls, bool at_text_start, std::vector<uint32_t>& list) {
    std::vector<uint32_t> stack = {from};
    while (!stack.empty()) {
      const uint32_t at = stack.back();
      stack.pop_back();
      if (++work == kMaxWork) refuse("takes too long to make an automaton of");
      if (seen[at] == round) continue;
      seen[at] = round;
      const Place& place = program.places[at];
      switch (place.kind) {
        case Place::kMatch:
          list.push_back(at);
          return true;
        case Place::kSet:
          list.push_back(at);
          break;
        case Place::kLook:
          if (cls == kUnknown) {
            list.push_back(at);
          } else if (cls == dfa.num_classes_ ? place.at_end : in_class(place.set, cls)) {
            stack.push_back(place.next);
          }
          break;
        case Place::kTextStart:
          if (at_text_start) stack.push_back(place.next);
          break;
        case Place::kFork:
          stack.push_back(place.other);
          stack.push_back(place.next);
          break;
      }
    }
    return false;
  }

  // The state for a list of places, made if it is new. 0, the dead one, has none.
  uint32_t state_of(const std::vector<uint32_t>& list) {
    const auto [found, is_new] = ids.try_emplace(list, uint32_t(lists.size()));
    if (is_new) {
      if (lists.size() == kMaxStates) refuse("needs more than " + std::to_string(kMaxStates) + " states");
      lists.push_back(list);
    }
    return found->second;
  }

  // The table's entry for reading `cls` in the state of `list`.
  uint32_t step(const std::vector<uint32_t>& list, uint32_t cls) {
    std::vector<uint32_t> ready, next;
    bool matched = false;
    ++round;
    for (size_t i = 0; i < list.size() && !matched; ++i) matched = follow(list[i], cls, false, ready);
    ++round;
    for (const uint32_t at : ready) {
      const Place& place = program.places[at];
      if (place.kind != Place::kSet || cls == dfa.num_classes_ || !in_class(place.set, cls)) continue;
      if (follow(place.next, kUnknown, false, next)) break;
    }
    return state_of(next) * dfa.stride_ << 1 | uint32_t(matched);
  }

  uint32_t start_state(bool at_text_start) {
    std::vector<uint32_t> list;
    ++round;
    follow(program.start, kUnknown, at_text_start, list);
    return state_of(list);
  }

  void make_table() {
    state_of({});
    const uint32_t start = start_state(false), text_start = start_state(true);
    for (size_t state = 0; state < lists.size(); ++state) {
      const std::vector<uint32_t> list = lists[state];
      for (uint32_t cls = 0; cls <= dfa.num_classes_; ++cls) dfa.table_.push_back(step(list, cls));
      if (dfa.table_.size() > kMaxEntries) refuse("needs more than " + std::to_string(kMaxEntries) + " transitions");
    }
    dfa.start_ = start * dfa.stride_;
    dfa.text_start_ = text_start * dfa.stride_;
    for (uint32_t cls = 0; cls <= dfa.num_classes_; ++cls) {
      if ((dfa.table_[dfa.start_ + cls] | dfa.table_[dfa.text_start_ + cls]) & 1) refuse("may match nothing");
      dfa.starts_match_.push_back((dfa.table_[dfa.start_ + cls] | dfa.table_[dfa.text_start_ + cls]) != 0);
    }
  }

  static constexpr uint64_t kMaxWork = 30'000'000;  // places visited: well below a second
  uint64_t work = 0;
  static constexpr size_t kMaxEntries = 4 << 20;  // so that states take 22 bits of a memo's key
  RegexDfa& dfa;
  const Program& program;
  std::vector<std::vector<bool>> members;  // [class][set]
  std::vector<uint32_t> seen;              // by place: the last round that met it
  uint32_t round = 0;
  std::map<std::vector<uint32_t>, uint32_t> ids;
  std::vector<std::vector<uint32_t>> lists;
};

RegexDfa::RegexDfa(std::string_view pattern) {
  const Program program(*parse_regex(pattern));
  Builder builder(*this, program);
  builder.make_classes();
  builder.make_table();
}

const uint8_t* RegexDfa::match_on(const Attempt& attempt, const uint8_t* q, uint32_t state, const uint8_t* last,
                                  Memo& memo) const {
  const uint8_t *begin = attempt.begin, *end = attempt.end;
  memo.candidates.clear();
  const uint8_t* next_note = begin + ((q - begin) + kMemoStride - 1) / kMemoStride * kMemoStride;
  for (;; ++memo.num_steps) {
    uint32_t cls = num_classes_, num_bytes = 0;
    if (q < end) {
      const DecodedCodePoint c = decode_utf8(q, end);
      cls = class_of(c.code_point);
      num_bytes = c.num_bytes;
    }
    if (q >= next_note) {
      next_note = begin + ((q - begin) / kMemoStride + 1) * kMemoStride;
      const uint64_t key = uint64_t(q - begin) << 24 | state;
      if (memo.dead.count(key)) break;
      memo.candidates.push_back(key);
    }
    const uint32_t entry = table_[state + cls];
    if (entry & 1) {
      last = q;
      memo.candidates.clear();
    }
    state = entry >> 1;
    if (state == kDead) break;
    q += num_bytes;
  }
  memo.dead.insert(memo.candidates.begin(), memo.candidates.end());
  if (memo.dead.size() > memo.prune_at) {  // attempts start at p or behind it
    for (auto it = memo.dead.begin(); it != memo.dead.end();) {
      it = int64_t(*it >> 24) < attempt.p - begin ? memo.dead.erase(it) : std::next(it);
    }
    memo.prune_at = std::max<size_t>(1 << 16, 2 * memo.dead.size());
  }
  return last;
}

}  // namespace herdkern::text

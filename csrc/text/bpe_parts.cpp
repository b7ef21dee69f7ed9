// Parts of texts: see bpe_parts.h.
#include "text/bpe_parts.h"

#include <algorithm>

namespace herdkern::text {

namespace {

bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

// Near `from` and before `end`: behind a line's end or before a space, where words of most patterns begin; `end` if
// there is none.
size_t likely_border(std::string_view text, size_t from, size_t end, size_t reach) {
  size_t space = end;
  for (size_t at = from; at + 1 < end && at < from + reach; ++at) {
    if (!is_space(text[at]) || is_space(text[at + 1]) || is_space(text[at - 1])) continue;
    if (text[at] == '\n') return at + 1;
    if (text[at] == ' ' && space == end) space = at;
  }
  return space;
}

// The parts of one long text.
void cut_text(Texts& texts, size_t index, const SpecialTokens& special, std::vector<TextPart>& parts) {
  texts.long_ones.push_back(std::make_unique<Utf8Buffer>());
  const std::string_view text = texts.long_ones.back()->utf8_of(texts.views[index]);
  texts.views[index] = text;
  if (special.find(text, 0, texts.forbidden).found()) throw ForbiddenToken();
  TextPart part{index, index + 1, parts.size(), true};
  const auto close = [&](size_t place, bool is_open, size_t run_begin, size_t run_end) {
    part.end = place;
    part.is_open_end = is_open;
    part.next_run_end = run_end;
    parts.push_back(part);
    part.begin = place;
    part.is_open_begin = is_open;
    part.run_begin = run_begin;
  };
  for (size_t from = 0;;) {
    const auto match = special.find(text, from, texts.special);
    const size_t run_end = match.found() ? match.begin : text.size();
    size_t place = std::max(from, part.begin);
    while (place + 2 * texts.part_bytes < run_end) {
      place += texts.part_bytes;
      const size_t border = likely_border(text, place, run_end, texts.part_bytes / 8);
      if (border == run_end) continue;
      close(border, true, from, run_end);
      place = border;
    }
    if (!match.found()) break;
    if (match.begin >= part.begin + texts.part_bytes) close(match.begin, false, match.begin, match.begin);
    from = match.end;
  }
  close(text.size(), false, 0, 0);
}

}  // namespace

std::vector<TextPart> cut_into_parts(Texts& texts, const SpecialTokens& special, bool can_cut) {
  std::vector<TextPart> parts;
  size_t first = 0, bytes = 0;
  const auto close = [&](size_t last) {
    if (first < last) parts.push_back({first, last, parts.size()});
    first = last;
    bytes = 0;
  };
  for (size_t i = 0; i < texts.views.size(); ++i) {
    const size_t size = texts.views[i].num_bytes();
    if (can_cut && size >= 4 * texts.part_bytes) {
      close(i);
      cut_text(texts, i, special, parts);
      first = i + 1;
    } else if ((bytes += size) >= texts.part_bytes) {
      close(i + 1);
    }
  }
  close(texts.views.size());
  return parts;
}

bool join_parts(std::vector<TextPart>& parts, size_t first, size_t last) {
  for (size_t i = first; i + 1 < last; ++i) {
    if (!parts[i].is_open_end) continue;
    const auto &tail = parts[i].tail, &head = parts[i + 1].head;
    size_t a = 0, b = 0;
    while (a < tail.size() && b < head.size() && tail[a].place != head[b].place) {
      ++(tail[a].place < head[b].place ? a : b);
    }
    if (a == tail.size() || b == head.size()) return false;
    parts[i].last_id = tail[a].num_ids;
    parts[i + 1].first_id = head[b].num_ids;
  }
  return true;
}

}  // namespace herdkern::text

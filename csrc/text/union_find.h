// Connected components of an undirected graph: every vertex is labelled with the smallest vertex of its component.
// Because the smaller root always wins, the labels do not depend on the order of the edges.
#pragma once
#include <cstdint>
#include <numeric>
#include <vector>

namespace herdkern::text {

class UnionFind {
 public:
  explicit UnionFind(int64_t size) : parent_(size) { std::iota(parent_.begin(), parent_.end(), int64_t{0}); }

  int64_t find(int64_t x) {  // path halving
    while (parent_[x] != x) x = parent_[x] = parent_[parent_[x]];
    return x;
  }

  void unite(int64_t x, int64_t y) {
    x = find(x);
    y = find(y);
    if (x < y) parent_[y] = x;
    if (y < x) parent_[x] = y;
  }

 private:
  std::vector<int64_t> parent_;
};

}  // namespace herdkern::text

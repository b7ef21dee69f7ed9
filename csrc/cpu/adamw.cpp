#include "cpu/adamw.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/simd.h"
#include "cpu/threads.h"

namespace herdkern::cpu::HK_ISA {
namespace {

constexpr int64_t kChunk = 1 << 15;  // elements of one task; by shape alone
constexpr int64_t kBlock = 512;      // elements that are widened at a time; a multiple of kRandom
constexpr int64_t kAhead = 128;      // elements; 512 bytes. Tried 256 to 2048 elements and two halves at once: slower
constexpr int64_t kRandom = 128;     // elements that one vector of Philox counters rounds

struct Chunk {
  int64_t tensor, begin, end;
};

std::vector<Chunk> cut(const AdamwTensor* tensors, int64_t num_tensors) {
  std::vector<Chunk> chunks;
  for (int64_t t = 0; t < num_tensors; ++t)
    for (int64_t begin = 0; begin < tensors[t].count; begin += kChunk)
      chunks.push_back({t, begin, std::min(begin + kChunk, tensors[t].count)});
  return chunks;
}

int threads_of(const std::vector<Chunk>& chunks, int num_threads) {
  return threads_for(static_cast<int64_t>(chunks.size()) * kChunk, num_threads);
}

HK_INLINE Vec sqrt(const Vec& x) {
#if defined(HK_VEC_AVX512)
  return _mm512_sqrt_ps(x.v);
#elif defined(HK_VEC_AVX2)
  return {_mm256_sqrt_ps(x.lo), _mm256_sqrt_ps(x.hi)};
#else
  float lanes[16];
  x.store(lanes);
  for (float& lane : lanes) lane = std::sqrt(lane);
  return Vec::load(lanes);
#endif
}

// The squares of a chunk, summed in fp64: 16 running sums, which are folded at the end.
template <typename T>
double sum_of_squares(const T* x, int64_t count) {
  typedef float Float8 __attribute__((vector_size(32)));
  typedef double Double8 __attribute__((vector_size(64)));
  Double8 sums[2] = {};
  const auto add = [&](const Vec& v) {
    float lanes[16];
    v.store(lanes);
    for (int i = 0; i < 2; ++i) {
      Float8 narrow;
      std::memcpy(&narrow, lanes + 8 * i, sizeof narrow);
      const Double8 wide = __builtin_convertvector(narrow, Double8);
      sums[i] += wide * wide;
    }
  };
  for_each_vec(
      count,
      [&](int64_t i) {
        __builtin_prefetch(x + i + kAhead);
        add(Vec::load(x + i));
      },
      [&](int64_t i, int n) { add(Vec::load_partial(x + i, n)); });
  double total = 0;
  for (int lane = 0; lane < 8; ++lane) total += sums[0][lane] + sums[1][lane];
  return total;
}

double sum_of_squares(const AdamwTensor& tensor, const Chunk& chunk) {
  const int64_t count = chunk.end - chunk.begin;
  switch (tensor.grad_type) {
    case Float::k32:
      return sum_of_squares(static_cast<const float*>(tensor.grad) + chunk.begin, count);
    case Float::kB16:
      return sum_of_squares(static_cast<const bf16*>(tensor.grad) + chunk.begin, count);
    case Float::k16:
      return sum_of_squares(static_cast<const fp16*>(tensor.grad) + chunk.begin, count);
  }
  return 0;
}

double norm_of(const AdamwTensor* tensors, const std::vector<Chunk>& chunks, int num_threads) {
  std::vector<double> sums(chunks.size());
  parallel_tasks(static_cast<int64_t>(chunks.size()), threads_of(chunks, num_threads), [&](int64_t i) {
    sums[static_cast<size_t>(i)] =
        sum_of_squares(tensors[chunks[static_cast<size_t>(i)].tensor], chunks[static_cast<size_t>(i)]);
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return std::sqrt(total);
}

// What the update of one tensor multiplies by, rounded to fp32 once.
struct Factors {
  Vec grad_scale, keep, lerp_weight, beta2, one_minus_beta2, root_correction, eps, minus_step_size;
  bool lerp_from_grad;

  Factors(const AdamwSettings& s, double step, double scale) {
    const double weight = 1 - s.beta1;
    grad_scale = Vec(static_cast<float>(s.maximize ? -scale : scale));
    keep = Vec(static_cast<float>(1 - s.lr * s.weight_decay));
    lerp_from_grad = static_cast<float>(weight) >= 0.5f;  // lerp from the nearer end
    lerp_weight = Vec(lerp_from_grad ? static_cast<float>(weight) - 1.0f : static_cast<float>(weight));
    beta2 = Vec(static_cast<float>(s.beta2));
    one_minus_beta2 = Vec(static_cast<float>(1 - s.beta2));
    root_correction = Vec(static_cast<float>(std::sqrt(1 - std::pow(s.beta2, step))));
    eps = Vec(static_cast<float>(s.eps));
    minus_step_size = Vec(-static_cast<float>(s.lr / (1 - std::pow(s.beta1, step))));
  }
};

struct Element {
  Vec w, m, v;
};

HK_INLINE Element updated(const Factors& f, const Vec& w, const Vec& grad, const Vec& m, const Vec& v) {
  const Vec g = grad * f.grad_scale;
  Element e;
  e.m = fma(f.lerp_weight, g - m, f.lerp_from_grad ? g : m);
  e.v = fma(f.one_minus_beta2 * g, g, v * f.beta2);
  e.w = w * f.keep + f.minus_step_size * e.m / (sqrt(e.v) / f.root_correction + f.eps);
  return e;
}

void update(const Factors& f, float* w, const float* g, float* m, float* v, int64_t count) {
  for_each_vec(
      count,
      [&](int64_t i) {
        for (const float* p :
             {static_cast<const float*>(w), g, static_cast<const float*>(m), static_cast<const float*>(v)})
          __builtin_prefetch(p + i + kAhead);
        const Element e = updated(f, Vec::load(w + i), Vec::load(g + i), Vec::load(m + i), Vec::load(v + i));
        e.w.store(w + i);
        e.m.store(m + i);
        e.v.store(v + i);
      },
      [&](int64_t i, int n) {
        const Element e = updated(f, Vec::load_partial(w + i, n), Vec::load_partial(g + i, n),
                                  Vec::load_partial(m + i, n), Vec::load_partial(v + i, n));
        e.w.store_partial(w + i, n);
        e.m.store_partial(m + i, n);
        e.v.store_partial(v + i, n);
      });
}

template <typename T>
void widen(const T* x, float* out, int64_t count) {
  for_each_vec(
      count, [&](int64_t i) { Vec::load(x + i).store(out + i); },
      [&](int64_t i, int n) { Vec::load_partial(x + i, n).store_partial(out + i, n); });
}

template <typename T>
void narrow(const float* x, T* out, int64_t count) {
  for_each_vec(
      count, [&](int64_t i) { Vec::load(x + i).store(out + i); },
      [&](int64_t i, int n) { Vec::load_partial(x + i, n).store_partial(out + i, n); });
}

// Philox4x32-10 on 16 counters (index + lane, step, stream): words[k][lane] is word k of the lane's result.
void random_words(uint64_t seed, uint64_t index, uint32_t step, uint32_t stream, uint32_t words[4][16]) {
  uint32_t c0[16], c1[16], c2[16], c3[16];
  for (uint32_t lane = 0; lane < 16; ++lane) {
    c0[lane] = static_cast<uint32_t>(index + lane);  // index is a multiple of 16: no carry between lanes
    c1[lane] = static_cast<uint32_t>(index >> 32);
    c2[lane] = step;
    c3[lane] = stream;
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u)
    for (int lane = 0; lane < 16; ++lane) {
      const uint64_t a = uint64_t{0xD2511F53u} * c0[lane], b = uint64_t{0xCD9E8D57u} * c2[lane];
      c0[lane] = static_cast<uint32_t>(b >> 32) ^ c1[lane] ^ key0;
      c1[lane] = static_cast<uint32_t>(b);
      c2[lane] = static_cast<uint32_t>(a >> 32) ^ c3[lane] ^ key1;
      c3[lane] = static_cast<uint32_t>(a);
    }
  std::memcpy(words[0], c0, sizeof c0);
  std::memcpy(words[1], c1, sizeof c1);
  std::memcpy(words[2], c2, sizeof c2);
  std::memcpy(words[3], c3, sizeof c3);
}

// Adds 16 random bits below the last kept one and cuts: up with a probability of what is cut off. Element i of a group
// of kRandom takes half i / 16 % 2 of word i / 32 in lane i % 16. first: number of element 0 in its tensor.
void narrow_at_random(const float* x, bf16* out, int64_t count, int64_t first, uint64_t seed, uint32_t step,
                      uint32_t stream) {
  for (int64_t begin = 0; begin < count; begin += kRandom) {
    uint32_t words[4][16];
    random_words(seed, static_cast<uint64_t>(first + begin) / kRandom * 16, step, stream, words);
    uint16_t rounded[kRandom];
    float padded[kRandom] = {};
    const int64_t size = std::min(kRandom, count - begin);
    std::memcpy(padded, x + begin, static_cast<size_t>(size) * sizeof(float));
    for (int j = 0; j < 8; ++j)
      for (int lane = 0; lane < 16; ++lane) {
        uint32_t bits;
        std::memcpy(&bits, padded + 16 * j + lane, sizeof bits);
        const uint32_t random = (words[j / 2][lane] >> (j % 2 * 16)) & 0xffffu;
        const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
        const uint32_t odd = (bits & 0x7fffffu) != 0 ? 0x400000u : 0u;  // a NaN stays one
        rounded[16 * j + lane] = static_cast<uint16_t>((finite ? bits + random : bits | odd) >> 16);
      }
    std::memcpy(out + begin, rounded, static_cast<size_t>(size) * sizeof(uint16_t));
  }
}

const float* widened(Float type, const void* x, int64_t begin, int64_t count, float* buffer) {
  switch (type) {
    case Float::k32:
      return static_cast<const float*>(x) + begin;
    case Float::kB16:
      widen(static_cast<const bf16*>(x) + begin, buffer, count);
      break;
    case Float::k16:
      widen(static_cast<const fp16*>(x) + begin, buffer, count);
      break;
  }
  return buffer;
}

void update_chunk(const Adamw& args, const AdamwTensor& t, const Chunk& chunk, double step, double scale) {
  const Factors factors(t.settings, step, scale);
  const bool is_narrow = t.param_type != Float::k32;
  const int64_t block = is_narrow || t.grad_type != Float::k32 ? kBlock : kChunk;
  alignas(64) float grads[kBlock], params[kBlock];  // what is widened stays in the first cache
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += block) {
    const int64_t count = std::min(block, chunk.end - begin);
    const float* g = widened(t.grad_type, t.grad, begin, count, grads);
    float* w = is_narrow ? params : static_cast<float*>(t.param) + begin;
    if (t.master != nullptr)
      w = t.master + begin;
    else if (is_narrow)
      widened(t.param_type, t.param, begin, count, params);
    update(factors, w, g, t.exp_avg + begin, t.exp_avg_sq + begin, count);
    if (t.param_type == Float::kB16) {
      bf16* out = static_cast<bf16*>(t.param) + begin;
      if (args.stochastic && t.master == nullptr)
        narrow_at_random(w, out, count, begin, args.seed, static_cast<uint32_t>(step), t.stream);
      else
        narrow(w, out, count);
    } else if (t.param_type == Float::k16) {
      narrow(w, static_cast<fp16*>(t.param) + begin, count);
    }
  }
}

}  // namespace

double grad_norm(const AdamwTensor* tensors, int64_t num_tensors, int num_threads) {
  return norm_of(tensors, cut(tensors, num_tensors), num_threads);
}

double adamw(const Adamw& args) {
  const std::vector<Chunk> chunks = cut(args.tensors, args.num_tensors);
  double norm = 0, scale = 1;
  if (args.max_grad_norm > 0) {
    norm = norm_of(args.tensors, chunks, args.num_threads);
    if (!std::isfinite(norm)) return norm;
    scale = std::min(1.0, args.max_grad_norm / (norm + 1e-6));  // as torch.nn.utils.clip_grad_norm_
  }
  std::vector<double> steps;
  for (int64_t i = 0; i < args.num_tensors; ++i) steps.push_back(static_cast<double>(*args.tensors[i].step += 1.0f));
  parallel_tasks(static_cast<int64_t>(chunks.size()), threads_of(chunks, args.num_threads), [&](int64_t i) {
    const Chunk& chunk = chunks[static_cast<size_t>(i)];
    update_chunk(args, args.tensors[chunk.tensor], chunk, steps[static_cast<size_t>(chunk.tensor)], scale);
  });
  return norm;
}

}  // namespace herdkern::cpu::HK_ISA

// Attention: what is decided on the host (lists of tiles, workspace, which padded head_dim), and the gradient of sinks.
#include "cuda/attention.h"
#include "cuda/attention_sink_gradient_kernel.cuh"
#include "cuda/attention_sizes.h"
#include "cuda/tile_list.h"

namespace herdkern::cuda {

// attention_<kDim>.cu
template <typename T, int kDim>
void launch_forward(AttentionForward args, cudaStream_t stream);
template <typename T, int kDim>
void launch_query_gradient(AttentionBackward args, cudaStream_t stream);
template <typename T, int kDim>
void launch_key_gradient(AttentionBackward args, cudaStream_t stream);

namespace {

constexpr int kSinkThreads = 1024;

// Calls run with the head_dim that the operand is padded to, as a constant.
template <typename Run>
auto with_head_dim(int64_t head_dim, const Run& run) {
  if (head_dim <= 64) return run(std::integral_constant<int, 64>());
  if (head_dim <= 96) return run(std::integral_constant<int, 96>());
  if (head_dim <= 128) return run(std::integral_constant<int, 128>());
  return run(std::integral_constant<int, 256>());
}

// A list of tiles as it lies in the workspace: tiles, their count, scratch.
struct ListPlan {
  TileCut cut;
  int64_t capacity, count_at, bytes;
};

ListPlan plan_list(const AttentionShape& shape, TileCut cut) {
  const int64_t capacity = tile_capacity(cut.of_keys ? shape.total_k : shape.total_q, shape.num_docs, cut.size);
  const int64_t count_at = capacity * static_cast<int64_t>(sizeof(Tile));
  return {cut, capacity, count_at, round_up(count_at + 4 * (shape.num_docs + 2), 16)};
}

// Tiles of queries; the blocks of keys that they meet are as long in both passes, or half as long, which orders alike.
ListPlan plan_queries(const AttentionShape& shape) {
  return with_head_dim(shape.head_dim, [&](auto dim) {
    using Sizes = ForwardSizes<decltype(dim)::value>;
    return plan_list(shape, {QueryFold::of(shape.group(), Sizes::kRows).positions, Sizes::kKeys, false});
  });
}

ListPlan plan_keys(const AttentionShape& shape) {
  return with_head_dim(shape.head_dim, [&](auto dim) {
    using Sizes = KeyGradientSizes<decltype(dim)::value>;
    return plan_list(shape, {Sizes::kKeys, QueryFold::of(shape.group(), Sizes::kRows).positions, true});
  });
}

TileList make_list(const AttentionShape& shape, const ListPlan& plan, unsigned char* place, cudaStream_t stream) {
  Tile* tiles = reinterpret_cast<Tile*>(place);
  int32_t* count = reinterpret_cast<int32_t*>(place + plan.count_at);
  if (plan.capacity > 0)
    launch_tile_list({shape.cu_q, shape.cu_k, static_cast<int32_t>(shape.num_docs), plan.capacity, shape.window,
                      plan.cut, tiles, count, count + 1},
                     stream);
  return {tiles, count, plan.capacity};
}

template <typename Run>
void with_types(const AttentionShape& shape, const Run& run) {
  with_head_dim(shape.head_dim, [&](auto dim) {
    if (shape.storage == Storage::kBfloat16) {
      run(bf16(), dim);
    } else {
      run(fp16(), dim);
    }
  });
}

}  // namespace

int64_t attention_workspace_bytes(const AttentionShape& shape, bool backward) {
  const int64_t lists = plan_queries(shape).bytes + (backward ? plan_keys(shape).bytes : 0);
  return lists + (backward ? 8 * shape.num_heads * shape.total_q : 0);
}

void launch_attention_forward(AttentionForward args, void* workspace, cudaStream_t stream) {
  args.tiles = make_list(args.shape, plan_queries(args.shape), static_cast<unsigned char*>(workspace), stream);
  if (args.tiles.capacity == 0) return;
  args.softmax = SoftmaxConstants::of(args.shape);
  with_types(args.shape, [&](auto type, auto dim) {
    constexpr int kDim = decltype(dim)::value;
    args.fold = QueryFold::of(args.shape.group(), ForwardSizes<kDim>::kRows);
    launch_forward<decltype(type), kDim>(args, stream);
  });
}

void launch_attention_backward(AttentionBackward args, void* workspace, cudaStream_t stream) {
  auto* place = static_cast<unsigned char*>(workspace);
  const ListPlan queries = plan_queries(args.shape), keys = plan_keys(args.shape);
  args.query_tiles = make_list(args.shape, queries, place, stream);
  args.key_tiles = make_list(args.shape, keys, place + queries.bytes, stream);
  args.softmax = SoftmaxConstants::of(args.shape);
  args.row_values = reinterpret_cast<float*>(place + queries.bytes + keys.bytes);
  with_types(args.shape, [&](auto type, auto dim) {
    constexpr int kDim = decltype(dim)::value;
    if (args.query_tiles.capacity > 0) launch_query_gradient<decltype(type), kDim>(args, stream);
    if (args.key_tiles.capacity > 0) launch_key_gradient<decltype(type), kDim>(args, stream);
  });
  if (args.dsinks != nullptr && args.shape.num_heads > 0)
    HK_LAUNCH(attention_sink_gradient_kernel, dim3(static_cast<unsigned>(args.shape.num_heads)), dim3(kSinkThreads), 0,
              stream, args);
}

}  // namespace herdkern::cuda

// Attention of head_dim 64: a source of its own, so that the head dims compile side by side.
#include "cuda/attention_launch.cuh"

namespace herdkern::cuda {

HK_ATTENTION_OF_HEAD_DIM(64);

}  // namespace herdkern::cuda

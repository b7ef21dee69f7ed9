// Attention of head_dim 96: a source of its own, so that the head dims compile side by side.
#include "cuda/attention_launch.cuh"

namespace herdkern::cuda {

HK_ATTENTION_OF_HEAD_DIM(96);

}  // namespace herdkern::cuda

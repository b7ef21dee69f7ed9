// The stream handle as CUDA's own headers declare it, for headers and bindings that are compiled without them.
#pragma once

typedef struct CUstream_st* cudaStream_t;  // NOLINT: as in driver_types.h, so that both may be included

// grace_cuda::*: the operators, each one call.
#include <intrinsics.cuh>

#include "call.h"

namespace grace::cuda {
namespace {

STABLE_TORCH_LIBRARY_IMPL(GRACE_CUDA_NAMESPACE, CUDA, m) { Operators<Call>::implement(m); }

}  // namespace
}  // namespace grace::cuda

// The kernels for warpgroups and bfloat16 keys.
#include <intrinsics.cuh>

#include "kernels.h"

namespace grace::cuda {

template Kernel warpgroups<BFloat>(const Asked&);

}  // namespace grace::cuda

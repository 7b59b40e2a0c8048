// The kernels for warpgroups and float16 keys.
#include <intrinsics.cuh>

#include "kernels.h"

namespace grace::cuda {

template Kernel warpgroups<Half>(const Asked&);

}  // namespace grace::cuda

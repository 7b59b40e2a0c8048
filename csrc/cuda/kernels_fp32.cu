// The kernels for float32 keys. A file for each type, since compiling them takes most of the time.
#include <intrinsics.cuh>

#include "kernels.h"

namespace grace::cuda {

template Kernel choose<float>(const Asked&, unsigned);
template Kernel apart<float>();
template Kernel coordinates<float>();

}  // namespace grace::cuda

// The kernels for float16 keys. A file for each type, since compiling them takes most of the time.
#include <intrinsics.cuh>

#include "kernels.h"

namespace grace::cuda {

template Kernel choose<Half>(const Asked&, unsigned);
template Kernel apart<Half>();
template Kernel coordinates<Half>();

}  // namespace grace::cuda

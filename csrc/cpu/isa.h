// Which instruction set's kernels run.
#pragma once

#include <string>

#include "lookup_kernel.h"

namespace grace::cpu {

// The kernels in use: those named by GRACE_KERNELS_ISA, otherwise the best this machine runs.
// Throws std::invalid_argument if that variable names none that can run here.
const Kernels& chosen_kernels();

}  // namespace grace::cpu

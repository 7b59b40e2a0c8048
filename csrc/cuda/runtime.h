// What the launcher asks of CUDA's run time: errors, and calls that may allocate during a capture.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace grace::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("grace_cuda: ") + what +
                           " failed: " + cudaGetErrorString(status));
}

// While it lives, this thread may allocate although a stream is being captured.
class RelaxedCapture {
 public:
  RelaxedCapture() {
    check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode");
  }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace grace::cuda

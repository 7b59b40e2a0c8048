// What the launcher keeps per device: properties, kernels that are loaded, tickets.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <map>
#include <mutex>
#include <set>

#include "kernels.h"
#include "tickets.h"

namespace grace::cuda {

// What is known of a device, asked once.
struct Device {
  explicit Device(int index) {
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index),
          "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
          "cudaDeviceGetAttribute");
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index),
          "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index),
          "cudaDeviceGetAttribute");
    capability = 10 * major + minor;
  }
  int processors = 0;    // multiprocessors
  int shared_limit = 0;  // bytes a block can have
  int capability = 0;    // 90 for 9.0
  std::set<const void*> prepared;
};

// The process's state: never destroyed, since the driver may be gone before it.
class State {
 public:
  static State& get() {
    static State* const state = new State;
    return *state;
  }

  const Device& device(int index) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return devices_.try_emplace(index, index).first->second;
  }

  // Loads the kernel and admits the shared memory it wants; a capture need not see that.
  void prepare(int index, const Kernel& kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::set<const void*>& prepared = devices_.at(index).prepared;
    if (prepared.count(kernel.function) != 0) return;
    const RelaxedCapture relaxed;
    const cudaError_t status = cudaFuncSetAttribute(
        kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes);
    if (status != cudaSuccess) cudaGetLastError();
    check(status, "preparing the kernel (cudaFuncSetAttribute)");
    prepared.insert(kernel.function);
  }

  Tickets tickets;

 private:
  std::mutex mutex_;
  std::map<int, Device> devices_;
};

// Makes the tensors' device the current one, for torch and for this library's own run time.
class OnDevice {
 public:
  explicit OnDevice(int index) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(index, &guard_));
    const cudaError_t status = cudaSetDevice(index);
    if (status == cudaSuccess) return;
    aoti_torch_delete_cuda_guard(guard_);
    check(status, "cudaSetDevice");
  }
  ~OnDevice() { aoti_torch_delete_cuda_guard(guard_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  CUDAGuardHandle guard_ = nullptr;
};

}  // namespace grace::cuda

// grace_cuda_emulated::*: the launcher and the kernels of csrc/cuda on CPU tensors.
#include <intrinsics.cuh>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

// The registration at the end of lookup.cu then reads (grace_cuda_emulated, CPU, m).
#define grace_cuda grace_cuda_emulated
#define grace_cuda_forms grace_cuda_forms_emulated
#define CUDA CPU
#define GRACE_WARPGROUPS
#include "../../../csrc/cuda/kernels_bf16.cu"
#include "../../../csrc/cuda/kernels_fp16.cu"
#include "../../../csrc/cuda/kernels_fp32.cu"
#include "../../../csrc/cuda/kernels_warpgroups_bf16.cu"
#include "../../../csrc/cuda/kernels_warpgroups_fp16.cu"
#include "../../../csrc/cuda/lookup.cu"
#undef CUDA
#undef grace_cuda_forms
#undef grace_cuda

extern "C" {

// What torch has only where it was built for CUDA.
AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle*) { return 0; }
AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle) { return 0; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

__attribute__((visibility("default"))) emulation::Controls* emulation_controls() {
  return &emulation::controls();
}

// What the margin takes a tensor core to err by.
__attribute__((visibility("default"))) extern const double emulation_tensor_error;
const double emulation_tensor_error = grace::cuda::kTensorError;

// Tickets for a launch on a stream, as the launcher takes them.
__attribute__((visibility("default"))) const unsigned* emulation_take(void* stream, int words) {
  using grace::cuda::State;
  return State::get().tickets.take(0, static_cast<cudaStream_t>(stream), words);
}

// Forget devices and tickets, as in a new process.
__attribute__((visibility("default"))) void emulation_reset() {
  using grace::cuda::State;
  State::get().~State();
  new (&State::get()) State;
}

}  // extern "C"

// What the launch before leaves for a dependent one.
static std::pair<char*, size_t> left_by(const dim3& before, const grace::cuda::Problem& p) {
  using namespace grace::cuda;
  const size_t blocks = size_t{before.x} * before.y;
  if (p.apart_slices != 0) {
    return {static_cast<char*>(p.partials), blocks * (p.apart_queries + 1) * sizeof(Partial)};
  }
  return {reinterpret_cast<char*>(p.sums), before.x * p.batch * kQuerySums * sizeof(float)};
}

static cudaError_t launch(const void* kernel, dim3 grid, dim3 threads, void** arguments,
                          size_t shared, bool dependent) {
  using grace::cuda::Problem;
  static dim3 before;
  emulation::Controls& controls = emulation::controls();
  if (controls.fail_launch != 0 && controls.launches >= controls.good_launches) {
    return static_cast<cudaError_t>(controls.fail_launch);
  }
  ++controls.launches;
  controls.kernel = kernel;
  controls.grid_x = grid.x;
  controls.grid_y = grid.y;
  controls.shared_bytes = static_cast<int>(shared);

  Problem p = *static_cast<const Problem*>(arguments[0]);
  p.relative *= controls.margin_scale;
  p.absolute *= controls.margin_scale;
  p.sketch.margin.coordinates *= controls.margin_scale;
  p.sketch.margin.square *= controls.margin_scale;
  controls.tickets = p.tickets;
  std::fill(p.index, p.index + p.batch, 0x5a5a5a5a5a5a5a5a);
  std::fill(p.distance, p.distance + p.batch, -NAN);

  std::mt19937& random = emulation::random();
  random.seed(controls.seed);
  std::vector<unsigned> order(grid.x * grid.y);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  emulation::Block& block = emulation::block();
  block.grid_dim = grid;
  block.body = [&] { reinterpret_cast<void (*)(Problem)>(const_cast<void*>(kernel))(p); };
  block.before = nullptr;
  std::vector<char> left;
  const auto [to, bytes] = dependent ? left_by(before, p) : std::pair<char*, size_t>{nullptr, 0};
  if (dependent) {
    left.assign(to, to + bytes);
    block.before = [&left, to = to] { std::memcpy(to, left.data(), left.size()); };
    ++controls.dependent;
  }
  for (const unsigned at : order) {
    // Nothing of it is there for a block that has not waited: NaN, and rows that are none.
    if (dependent) std::memset(to, 0xff, bytes);
    block.block_index = {at % grid.x, at / grid.x, 0};
    block.run(threads.x, shared, random);
  }
  before = grid;
  for (unsigned i = 0; i < grid.y; ++i) controls.tickets_left += p.tickets[i] != 0;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 threads, void** arguments,
                             size_t shared, cudaStream_t) {
  return launch(kernel, grid, threads, arguments, shared, false);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** arguments) {
  return launch(kernel, config->grid, config->threads, arguments, config->shared,
                config->attrs->val.programmaticStreamSerializationAllowed != 0);
}

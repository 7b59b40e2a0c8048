// Tickets of the lookup kernels: words in device memory that are 0 between launches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "runtime.h"

namespace grace::cuda {

// Hands out words that no two kernels use at the same time. Launches on one stream follow one
// another, so a stream has its words for good (by its id: a handle may be given out again). A graph
// may be replayed beside anything else, so every captured launch gets words of its own; two
// replays at a time of one graph would share its outputs as well.
class Tickets {
 public:
  // Return `words` words (at most kPerStream) for a launch on `stream` of the current `device`.
  unsigned* take(int device, cudaStream_t stream, int words) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &capture), "cudaStreamIsCapturing");
    const std::lock_guard<std::mutex> lock(mutex_);
    if (capture != cudaStreamCaptureStatusNone) return cut(device, words);
    unsigned long long id = 0;
    check(cudaStreamGetId(stream, &id), "cudaStreamGetId");
    unsigned*& kept = streams_[{device, id}];
    if (kept == nullptr) kept = cut(device, kPerStream);
    return kept;
  }

  static constexpr int kPerStream = 512;

 private:
  static constexpr int64_t kSlab = 1 << 18;  // words; 1 MiB

  struct Slab {
    unsigned* words = nullptr;
    int64_t used = kSlab;
  };

  unsigned* cut(int device, int words) {
    Slab& slab = slabs_[device];
    if (slab.used + words > kSlab) {
      slab.words = zeroed();
      slab.used = 0;
    }
    unsigned* const cut = slab.words + slab.used;
    slab.used += words;
    return cut;
  }

  // On a stream of its own, so that it works while another one is being captured. A slab is never
  // freed: graphs may hold its words.
  static unsigned* zeroed() {
    const RelaxedCapture relaxed;
    void* memory = nullptr;
    cudaStream_t stream = nullptr;
    const char* what = "allocating tickets (cudaMalloc)";
    cudaError_t status = cudaMalloc(&memory, kSlab * sizeof(unsigned));
    if (status == cudaSuccess) {
      what = "zeroing tickets";
      status = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    }
    if (status == cudaSuccess) {
      status = cudaMemsetAsync(memory, 0, kSlab * sizeof(unsigned), stream);
    }
    if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
    if (stream != nullptr) cudaStreamDestroy(stream);
    if (status != cudaSuccess) {
      if (memory != nullptr) cudaFree(memory);
      cudaGetLastError();  // or the next check would report it again
      check(status, what);
    }
    return static_cast<unsigned*>(memory);
  }

  std::mutex mutex_;
  std::map<std::pair<int, unsigned long long>, unsigned*> streams_;
  std::map<int, Slab> slabs_;
};

}  // namespace grace::cuda

// grace_cuda::*: the operators, each one call.
#include <intrinsics.cuh>

#include "call.h"

namespace grace::cuda {
namespace {

std::tuple<Tensor, Tensor> nearest(Tensor query, Tensor keys, Tensor radii,
                                   std::optional<Tensor> count) {
  return Call(query, keys, radii, count, false).run();
}

std::tuple<Tensor, Tensor> lookup(Tensor query, Tensor keys, Tensor radii,
                                  std::optional<Tensor> count) {
  return Call(query, keys, radii, count, true).run();
}

std::tuple<Tensor, Tensor> adapt_(Tensor hidden, Tensor source, Tensor query_row, Tensor first_row,
                                  Tensor last_row, Tensor keys, Tensor radii, Tensor values,
                                  std::optional<Tensor> count) {
  Call call(source, keys, radii, count, true);
  call.ask(query_row);
  call.write(hidden, values, first_row, last_row);
  return call.run();
}

std::tuple<Tensor, Tensor> pruned_lookup(Tensor query, Tensor keys, Tensor radii,
                                         std::optional<Tensor> count, Tensor centre,
                                         Tensor directions, Tensor scales, Tensor head, Tensor tail,
                                         Tensor covered, Tensor radius_bound, Tensor outliers,
                                         Tensor counters) {
  Call call(query, keys, radii, count, true);
  call.use({centre, directions, scales, head, tail, covered, radius_bound, outliers, counters});
  return call.run();
}

std::tuple<Tensor, Tensor> pruned_adapt_(Tensor hidden, Tensor source, Tensor query_row,
                                         Tensor first_row, Tensor last_row, Tensor keys,
                                         Tensor radii, Tensor values, std::optional<Tensor> count,
                                         Tensor centre, Tensor directions, Tensor scales,
                                         Tensor head, Tensor tail, Tensor covered,
                                         Tensor radius_bound, Tensor outliers, Tensor counters) {
  Call call(source, keys, radii, count, true);
  call.ask(query_row);
  call.write(hidden, values, first_row, last_row);
  call.use({centre, directions, scales, head, tail, covered, radius_bound, outliers, counters});
  return call.run();
}

STABLE_TORCH_LIBRARY_IMPL(grace_cuda, CUDA, m) {
  m.impl("nearest", TORCH_BOX(&nearest));
  m.impl("lookup", TORCH_BOX(&lookup));
  m.impl("adapt_", TORCH_BOX(&adapt_));
  m.impl("pruned_lookup", TORCH_BOX(&pruned_lookup));
  m.impl("pruned_adapt_", TORCH_BOX(&pruned_adapt_));
}

}  // namespace
}  // namespace grace::cuda

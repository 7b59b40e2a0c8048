// grace_cuda::*: the operators, each one call.
#include <intrinsics.cuh>

#include "call.h"

namespace grace::cuda {
namespace {

// Which forms that are off by default are in use, with commas between them.
void use(std::string names) { forms_chosen() = forms_of(names); }

std::string in_use() {
  const unsigned forms = forms_in_use();
  std::string names;
  for (const FormName& form : kFormNames) {
    if (forms & form.form) names += (names.empty() ? "" : ",") + std::string(form.name);
  }
  return names;
}

STABLE_TORCH_LIBRARY_IMPL(GRACE_CUDA_NAMESPACE, CUDA, m) { Operators<Call>::implement(m); }

STABLE_TORCH_LIBRARY_IMPL(GRACE_CUDA_FORMS_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("use", TORCH_BOX(&use));
  m.impl("in_use", TORCH_BOX(&in_use));
}

}  // namespace
}  // namespace grace::cuda

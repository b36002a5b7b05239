// New CPU tensors by the shortest way: through the dispatcher each would cost a microsecond, a third of a small hit.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>

namespace torchcache {

// int64, contiguous, uninitialized: [n], or [n, columns].
inline torch::stable::Tensor new_int64(size_t n, int64_t columns = 0) {
  const int64_t sizes[2] = {static_cast<int64_t>(n), columns};
  const int64_t strides[2] = {columns > 0 ? columns : 1, 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(columns > 0 ? 2 : 1, sizes, strides, aoti_torch_dtype_int64(),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace torchcache

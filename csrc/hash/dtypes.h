// The one list of dtypes: bytes of an element.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace torchcache {

inline int64_t item_size(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Float8_e5m2:
    case ScalarType::Float8_e4m3fn:
    case ScalarType::Float8_e5m2fnuz:
    case ScalarType::Float8_e4m3fnuz:
      return 1;
    case ScalarType::Short:
    case ScalarType::UInt16:
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Int:
    case ScalarType::UInt32:
    case ScalarType::Float:
    case ScalarType::ComplexHalf:
      return 4;
    case ScalarType::Long:
    case ScalarType::UInt64:
    case ScalarType::Double:
    case ScalarType::ComplexFloat:
      return 8;
    case ScalarType::ComplexDouble:
      return 16;
    default:
      throw std::invalid_argument("torchcache cannot hash tensors of scalar type " +
                                  std::to_string(static_cast<int>(t.scalar_type())));
  }
}

// Whether there is memory behind every element: a storage may have been freed or made smaller under a tensor.
inline bool has_bytes(const torch::stable::Tensor& t) {
  if (t.numel() == 0) return true;
  int64_t storage = 0, last = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &last));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &storage));
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  return t.const_data_ptr() != nullptr && (last + 1) * item_size(t) <= storage;
}

}  // namespace torchcache

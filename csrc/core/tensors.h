// Tensors through the stable ABI: the one list of dtypes, where a tensor is, whether there is memory behind it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace torchcache::core {

// Bytes of an element.
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

// Whether there is memory behind the elements from the first one to the `last`, counted in memory.
inline bool has_bytes(const torch::stable::Tensor& t, int64_t last, int64_t item) {
  int64_t storage = 0, first = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &first));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &storage));
  return (first + last + 1) * item <= storage;
}

// The same for every element: a storage may have been freed or made smaller under a tensor.
inline bool has_bytes(const torch::stable::Tensor& t) {
  if (t.numel() == 0) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  return t.const_data_ptr() != nullptr && has_bytes(t, last, item_size(t));
}

constexpr int32_t kCpu = -1;

// Where a tensor is: kCpu, or the index of a CUDA device.
inline int32_t device_of(const torch::stable::Tensor& t) {
  if (t.is_cpu()) return kCpu;
  if (!t.is_cuda()) throw std::invalid_argument("torchcache hashes tensors on the CPU and on CUDA devices");
  return t.get_device_index();
}

// A CPU tensor, int64, contiguous, uninitialized: [n], or [n, columns]. Through the dispatcher it would cost a
// microsecond, a third of a small hit.
inline torch::stable::Tensor new_int64(size_t n, int64_t columns = 0) {
  const int64_t sizes[2] = {static_cast<int64_t>(n), columns};
  const int64_t strides[2] = {columns > 0 ? columns : 1, 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(columns > 0 ? 2 : 1, sizes, strides, aoti_torch_dtype_int64(),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

// The shape of leaves [n, …] of which n is still open.
class RowShape {
 public:
  // That of a contiguous tensor [any, …].
  explicit RowShape(const torch::stable::Tensor& like)
      : sizes_(like.sizes().begin(), like.sizes().end()), strides_(sizes_.size(), 1), dtype_(like.scalar_type()) {
    if (sizes_.empty()) throw std::invalid_argument("leaves must be tensors [rows, ...]");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype_code_));
    row_bytes_ = item_size(like);
    for (size_t d = sizes_.size(); d-- > 1; row_bytes_ *= sizes_[d]) strides_[d - 1] = strides_[d] * sizes_[d];
  }

  int64_t row_bytes() const { return row_bytes_; }

  // An uninitialized tensor [n, …] on a device (see device_of), on the CPU in pinned memory if wanted.
  torch::stable::Tensor empty(int64_t n, int32_t device, bool pinned) const {
    std::vector<int64_t> sizes = sizes_;
    sizes[0] = n;
    if (device == kCpu && pinned)
      return torch::stable::empty(sizes, dtype_, std::nullopt,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), /*pin_memory=*/true);
    const int32_t type = device == kCpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
    AtenTensorHandle handle;  // not through the dispatcher, which would cost a microsecond
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides_.data(),
                                                    dtype_code_, type, device == kCpu ? 0 : device, &handle));
    return torch::stable::Tensor(handle);
  }

 private:
  std::vector<int64_t> sizes_, strides_;
  torch::headeronly::ScalarType dtype_;
  int32_t dtype_code_ = 0;
  int64_t row_bytes_ = 0;
};

}  // namespace torchcache::core

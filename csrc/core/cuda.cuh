// What every CUDA source needs: errors as exceptions, the caller's device and stream, memory by torch's allocator.
//
// The CUDA runtime is linked statically, so that the library also loads beside a torch with another one, or with none.
// The two share the device's primary context, hence streams and memory.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

// Of libtorch_cuda. Weak: a torch without CUDA does not have it, and never gets here.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace torchcache::core {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next launch would report it again
  throw std::runtime_error(std::string("torchcache: ") + what + ": " + cudaGetErrorString(error));
}

// Makes a device current: for torch, which also goes back without touching other devices, and for the runtime here.
class Current {
 public:
  explicit Current(int32_t device) : guard_(device) { check(cudaSetDevice(device), "choosing a CUDA device"); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

inline cudaStream_t current_stream(int32_t device) {
  if (aoti_torch_get_current_cuda_stream == nullptr)
    throw std::runtime_error("torchcache: a CUDA tensor, but this torch is built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void refuse_capture(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "asking a CUDA stream whether it is captured");
  if (status != cudaStreamCaptureStatusNone)
    throw std::runtime_error(
        "torchcache: a cached module cannot be part of a CUDA graph, which would give the rows of the capture for any "
        "input: call it outside of torch.cuda.graph, or set torchcache_enabled = False on it for the capture");
}

// Uninitialized, of the stream that is current: used there in order, it can be given back without waiting.
inline torch::stable::Tensor device_memory(int32_t device, int64_t words) {
  const int64_t size = std::max<int64_t>(1, words), stride = 1;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_int64(),
                                                  aoti_torch_device_type_cuda(), device, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace torchcache::core

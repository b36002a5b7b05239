// The gather of rows on CUDA devices. Which thread moves what is said in gather.h, which a test runs without a device.
#include "core/cuda.cuh"
#include "memory/gather.h"

namespace torchcache::memory {
namespace {

using core::check;
using core::Current;
using core::current_stream;
using core::device_memory;
using core::refuse_capture;

constexpr int kThreads = 128;  // of a block
constexpr int64_t kMaxBlocks = 1 << 20;

template <class Unit>
__global__ void __launch_bounds__(kThreads) gather_kernel(const Gather g) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads / kCopiers, parts = g.parts();
  int64_t part = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / kCopiers;
  for (; part < parts; part += step) copy_part<Unit>(g, part, threadIdx.x % kCopiers);
}

void gather(int32_t device, const std::vector<const uint8_t*>& rows, int64_t bytes, uint8_t* out) {
  if (rows.empty() || bytes == 0) return;
  const Current current(device);
  const cudaStream_t stream = current_stream(device);
  refuse_capture(stream);
  const torch::stable::Tensor list = device_memory(device, static_cast<int64_t>(rows.size()));
  // From pageable memory: it has been read when this returns.
  check(cudaMemcpyAsync(list.mutable_data_ptr(), rows.data(), sizeof(rows[0]) * rows.size(), cudaMemcpyHostToDevice,
                        stream),
        "copying a list of rows to a CUDA device");
  const Gather g{static_cast<const uint8_t* const*>(list.const_data_ptr()), out, static_cast<int64_t>(rows.size()),
                 bytes};
  const int64_t blocks = std::min((g.parts() * kCopiers + kThreads - 1) / kThreads, kMaxBlocks);
  with_unit(rows, bytes, out, [&](auto unit) {
    gather_kernel<decltype(unit)><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(g);
  });
  check(cudaGetLastError(), "starting the kernel that gathers rows");
}

const bool registered = (register_device_gather(gather), true);

}  // namespace
}  // namespace torchcache::memory

// The hash on CUDA devices: kernels that hash messages by teams of eight threads, and what they need: the caller's
// stream, memory on the device by torch's allocator, pinned memory for the one transfer. Which thread reads what is
// said in team.h, batch.h and plan.h, which tests run without a device.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/cuda.cuh"
#include "hash/batch.h"
#include "hash/device.h"
#include "hash/plan.h"
#include "hash/sources.h"
#include "hash/team.h"

namespace torchcache::hash {
namespace {

using core::check;
using core::Current;
using core::current_stream;
using core::device_memory;
using core::refuse_capture;
using torch::stable::Tensor;

constexpr int kThreads = 128;     // of a block: 16 teams
constexpr int kBlocksAtOnce = 5;  // on one multiprocessor: 96 registers a thread, and 64 images all at once on an H100

// ---- kernels

// A lane in each of eight neighbouring threads of a warp.
class ThreadTeam {
 public:
  __device__ explicit ThreadTeam(int lane) : lane_(lane), threads_(0xFFu << (threadIdx.x % 32 / kLanes * kLanes)) {}

  template <class F>
  __device__ __forceinline__ void each(const F& f) {
    f(lane_);
  }
  __device__ __forceinline__ void exchange() {
    lane_.value += __shfl_xor_sync(threads_, lane_.sum, 1, kLanes);
    lane_.sum = 0;
  }
  __device__ __forceinline__ void collect(uint64_t values[kLanes]) const {
    TORCHCACHE_UNROLL
    for (int i = 0; i < kLanes; ++i) values[i] = __shfl_sync(threads_, lane_.value, i, kLanes);
  }
  __device__ __forceinline__ bool writes() const { return lane_.index == 0; }
  __device__ __forceinline__ void settle() const {
    __threadfence();
    __syncwarp(threads_);
  }
  __device__ __forceinline__ bool last(uint32_t* counter, int64_t n) const {
    uint32_t before = 0;
    if (writes()) {
      __threadfence();  // what this team wrote comes before the count
      before = atomicAdd(counter, 1);
      __threadfence();  // and what others wrote before theirs is there for what follows
    }
    before = __shfl_sync(threads_, before, 0, kLanes);
    __syncwarp(threads_);
    return before + 1 == n;
  }

 private:
  Lane lane_;
  unsigned threads_;  // of this team: others of the warp may be elsewhere in the code
};

template <class Source>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) digest_kernel(const __grid_constant__ Batch batch) {
  const TeamPosition place = team_position(blockIdx.x, threadIdx.x, gridDim.x, kThreads);
  ThreadTeam team(place.lane);
  digest_batch<Source>(team, batch, place.first, place.step);
}

__global__ void sample_kernel(const Sample* samples, int64_t count, uint64_t* out) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i < count) out[i] = samples[i].value();
}

// ---- pinned memory

// Pinned memory for results. A released buffer is reused and never freed: operations may still run in other threads
// while the process exits.
class Pinned {
 public:
  explicit Pinned(size_t bytes) : buffer_(acquire(bytes)) {}
  ~Pinned() {
    std::lock_guard lock(mutex());
    spare().push_back(buffer_);
  }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;

  uint64_t* words() const { return static_cast<uint64_t*>(buffer_.memory); }

 private:
  struct Buffer {
    void* memory;
    size_t bytes;
  };

  static std::mutex& mutex() {
    static auto* instance = new std::mutex;
    return *instance;
  }
  static std::vector<Buffer>& spare() {
    static auto* instance = new std::vector<Buffer>;
    return *instance;
  }

  static Buffer acquire(size_t bytes) {
    constexpr size_t kSmallest = 64 << 10;
    {
      std::lock_guard lock(mutex());
      for (Buffer& candidate : spare()) {
        if (candidate.bytes < bytes) continue;
        std::swap(candidate, spare().back());
        const Buffer reused = spare().back();
        spare().pop_back();
        return reused;
      }
    }
    size_t size = kSmallest;
    while (size < bytes) size *= 2;
    void* memory = nullptr;
    check(cudaHostAlloc(&memory, size, cudaHostAllocPortable), "allocating pinned memory");
    return {memory, size};
  }

  Buffer buffer_;
};

// ---- requests

struct DeviceSampleList : SampleList {
  DeviceSampleList(int32_t where, const std::vector<Sample>& samples)
      : SampleList(where, samples.size()), memory(device_memory(where, static_cast<int64_t>(2 * samples.size()))) {
    if (samples.empty()) return;
    const cudaStream_t stream = current_stream(where);
    check(cudaMemcpyAsync(memory.mutable_data_ptr(), samples.data(), sizeof(Sample) * samples.size(),
                          cudaMemcpyHostToDevice, stream),
          "copying a list of samples to a CUDA device");
    check(cudaStreamSynchronize(stream), "copying a list of samples to a CUDA device");  // for readers on any stream
  }

  Tensor memory;
};

void launch(const Batch& batch, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(blocks_for(batch.messages(), kThreads));
  if (blocks == 0) return;
  if (batch.done != nullptr)
    check(cudaMemsetAsync(batch.done, 0, sizeof(*batch.done) * batch.rows.count, stream), "starting a hash");
  with_source(batch.rows, [&](auto source) {
    digest_kernel<typename decltype(source)::type><<<blocks, kThreads, 0, stream>>>(batch);
  });
  check(cudaGetLastError(), "starting a hash kernel");
}

class QueuedHash : public PendingHash {
 public:
  QueuedHash(int32_t device, HashRequest request) : device_(device), request_(std::move(request)) {
    if (request_.keyed) {
      count_ = request_.rows[0].count;
    } else {
      for (const Rows& rows : request_.rows) count_ += rows.count;
    }
    const int64_t words = 2 * count_ + list_size();
    if (words == 0) return;
    const Current current(device);
    stream_ = current_stream(device);
    refuse_capture(stream_);
    pinned_ = std::make_unique<Pinned>(8 * words);
    const Tensor result = device_memory(device, words), space = device_memory(device, 2 * space_needed());
    queue(static_cast<Canonical*>(result.mutable_data_ptr()), static_cast<Canonical*>(space.mutable_data_ptr()));
    pending_ = true;
    check(cudaMemcpyAsync(pinned_->words(), result.const_data_ptr(), 8 * words, cudaMemcpyDeviceToHost, stream_),
          "copying keys to the host");
  }

  ~QueuedHash() override {
    try {
      wait();        // the transfer must not write into memory of somebody else
    } catch (...) {  // the device is lost; the next call on it will say so
    }
  }

  void wait() override {
    if (!pending_) return;
    pending_ = false;
    const Current current(device_);
    check(cudaStreamSynchronize(stream_), "waiting for keys");
  }

  std::vector<Digest> digests() const override {
    std::vector<Digest> result(count_);
    if (count_ == 0) return result;
    const auto* digests = reinterpret_cast<const Canonical*>(pinned_->words());
    std::transform(digests, digests + count_, result.begin(), number);
    return result;
  }

  const uint64_t* values() const override { return list_size() == 0 ? nullptr : pinned_->words() + 2 * count_; }

 private:
  int64_t list_size() const { return request_.samples == nullptr ? 0 : static_cast<int64_t>(request_.samples->count); }

  int64_t space_needed() const { return request_.keyed ? space_for_keys(request_.rows) : space_for(request_.rows); }

  void queue(Canonical* result, Canonical* space) const {
    const auto start = [this](const Batch& batch) { launch(batch, stream_); };
    Canonical* next = result;
    if (request_.keyed) {
      launch_keys(request_.rows, request_.call, space, result, start);
      next += count_;
    } else {
      for (const Rows& rows : request_.rows) {
        start(batch_of(rows, space, next));
        next += rows.count;
      }
    }
    if (list_size() > 0) read_samples(reinterpret_cast<uint64_t*>(next));
  }

  void read_samples(uint64_t* out) const {
    const auto& list = static_cast<const DeviceSampleList&>(*request_.samples);
    const auto blocks = static_cast<unsigned>((list_size() + kThreads - 1) / kThreads);
    sample_kernel<<<blocks, kThreads, 0, stream_>>>(static_cast<const Sample*>(list.memory.const_data_ptr()),
                                                    list_size(), out);
    check(cudaGetLastError(), "starting the kernel that reads samples");
  }

  int32_t device_;
  HashRequest request_;
  int64_t count_ = 0;  // digests
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<Pinned> pinned_;
  bool pending_ = false;
};

class CudaHasher : public DeviceHasher {
 public:
  std::unique_ptr<PendingHash> enqueue(int32_t device, HashRequest request) const override {
    return std::make_unique<QueuedHash>(device, std::move(request));
  }

  std::shared_ptr<const SampleList> upload_samples(int32_t device, const std::vector<Sample>& samples) const override {
    const Current current(device);
    refuse_capture(current_stream(device));
    return std::make_shared<DeviceSampleList>(device, samples);
  }

  std::vector<int64_t> architectures() const override { return {__CUDA_ARCH_LIST__}; }
};

const bool registered = (register_device_hasher(new CudaHasher), true);

}  // namespace
}  // namespace torchcache::hash

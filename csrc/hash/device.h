// Hash requests to a CUDA device. No torch and no CUDA here: a library without CUDA lacks only the implementation
// (cuda.cu).
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "hash/digest.h"
#include "hash/layout.h"
#include "hash/xxh3.h"

namespace torchcache::hash {

// Up to 64 bytes somewhere on a device, which a probe reads as one number.
struct Sample {
  static constexpr uint64_t kMaxBytes = xxh3::kStripe;
  const uint8_t* at;
  uint64_t bytes;

  TORCHCACHE_HD uint64_t value() const {
    constexpr uint64_t secret[8] = {xxh3::secret64(0),  xxh3::secret64(8),  xxh3::secret64(16), xxh3::secret64(24),
                                    xxh3::secret64(32), xxh3::secret64(40), xxh3::secret64(48), xxh3::secret64(56)};
    uint64_t words[8] = {};
    if (bytes == kMaxBytes)
      memcpy(words, at, kMaxBytes);
    else
      memcpy(words, at, bytes);
    return xxh3::merge(words, secret, bytes);
  }
};

// Samples that are read again and again. The list of them lies on their device.
struct SampleList {
  int32_t device;
  size_t count;
  virtual ~SampleList() = default;

 protected:
  SampleList(int32_t where, size_t n) : device(where), count(n) {}
};

// All that a call needs of one device, with one transfer and one wait.
struct HashRequest {
  std::vector<Rows> rows;
  bool keyed = false;  // the rows are the arguments of one batch, whose keys are wanted instead of the row digests
  Digest call{};
  std::shared_ptr<const SampleList> samples;  // or none
};

// A request that was enqueued on the caller's stream. The destructor waits for it.
class PendingHash {
 public:
  virtual ~PendingHash() = default;
  virtual void wait() = 0;

  // After wait(): the keys, or the digests of all rows in order; and the values of the samples.
  virtual std::vector<Digest> digests() const = 0;
  virtual const uint64_t* values() const = 0;
};

// Thread-safe. Everything is queued on the stream that is current for the calling thread, on the device that is named,
// whichever is current. std::runtime_error while that stream captures a graph: replays would return the keys of the
// capture for any input.
class DeviceHasher {
 public:
  virtual ~DeviceHasher() = default;
  virtual std::unique_ptr<PendingHash> enqueue(int32_t device, HashRequest request) const = 0;
  virtual std::shared_ptr<const SampleList> upload_samples(int32_t device,
                                                           const std::vector<Sample>& samples) const = 0;
  // 100 × the compute capabilities that there is code for, such as 900.
  virtual std::vector<int64_t> architectures() const = 0;
};

// Null in a library without CUDA.
const DeviceHasher* device_hasher();

// Called while the library is loaded.
void register_device_hasher(const DeviceHasher* hasher);

}  // namespace torchcache::hash

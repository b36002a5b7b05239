// What is asked of a CUDA device, and who answers. No torch and no CUDA here: a library without CUDA has everything but
// the answers (cuda.cu).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "hash/digest.h"
#include "hash/layout.h"

namespace torchcache {

// Up to 8 bytes somewhere on a device.
struct Word {
  const uint8_t* at;
  uint64_t bytes;
};

// Words to look at again and again; the list of them lies on their device.
struct WordList {
  int32_t device;
  size_t count;
  virtual ~WordList() = default;

 protected:
  WordList(int32_t where, size_t n) : device(where), count(n) {}
};

// All that a call wants of one device: one answer, one transfer, one wait.
struct Question {
  std::vector<Rows> rows;
  bool keyed = false;  // the rows are the arguments of one batch, of which the keys are wanted, not the row digests
  Digest call{};
  std::shared_ptr<const WordList> words;  // or none
};

// Work that was queued on the caller's stream. Waits for it when it is destroyed.
class Answer {
 public:
  virtual ~Answer() = default;
  virtual void wait() = 0;

  // After wait(): the keys, or the digests of all rows in order; and the words.
  virtual std::vector<Digest> digests() const = 0;
  virtual const uint64_t* words() const = 0;
};

// Thread-safe. Everything is queued on the stream that is current for the calling thread, on the device that is named,
// whichever is current. std::runtime_error while that stream captures a graph: the answer would be that of the capture,
// for ever.
class Device {
 public:
  virtual ~Device() = default;
  virtual std::unique_ptr<Answer> ask(int32_t device, Question question) const = 0;
  virtual std::shared_ptr<const WordList> keep(int32_t device, const std::vector<Word>& words) const = 0;
  // 100 × the compute capabilities that there is code for, such as 900.
  virtual std::vector<int64_t> architectures() const = 0;
};

// Null in a library without CUDA.
const Device* cuda();

// Called while the library is loaded.
void register_cuda(const Device* device);

}  // namespace torchcache

// The segments of a store's directory, and which of their files are open.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "store/format/format.h"
#include "store/format/segment.h"
#include "store/os/file.h"

namespace torchcache::store {

using Clock = std::chrono::steady_clock;

// A segment of the directory, of any writer.
struct Segment {
  SegmentId id{};
  bool own = false;                  // written by this process now: its rows come from the writer, not from a scan
  bool gone = false;                 // no longer in the directory
  bool scanned = false;              // at least once
  bool sealed = false;               // has an index: it is not expected to grow
  uint64_t position = kHeaderBytes;  // where the next scan begins
  std::vector<Hole> holes;           // damage, or bytes that are not visible yet
  FileState state;                   // at the last scan
  Clock::time_point changed;         // when `state` last differed from the one before
  std::shared_ptr<File> file;        // while it is open
  uint64_t last_use = 0;             // of the file, as a count of uses
};

// Not thread-safe: guarded by the store's mutex.
class SegmentRegistry {
 public:
  // Returns the number of the new segment. Numbers stay what they are.
  uint32_t add(const SegmentId& id);
  std::optional<uint32_t> find(const SegmentId& id) const;
  // The segment is no longer in the directory: closes its file; another one may get its id.
  void remove(uint32_t number);

  Segment& operator[](uint32_t number) { return segments_[number]; }
  const Segment& operator[](uint32_t number) const { return segments_[number]; }
  // From now on this process is not the writer of any of them.
  void disown_all();
  // Numbers of the segments of other processes that are not in this sorted listing of the directory.
  std::vector<uint32_t> missing_from(const std::vector<SegmentId>& listed) const;

  // The open file of a segment, or null.
  std::shared_ptr<File> file(uint32_t number);
  // Leaves a file open for the next reader; at most 128 are open.
  void set_file(uint32_t number, std::shared_ptr<File> file);
  // The file is opened by its name again at the next use.
  void close_file(uint32_t number);
  void close_all_files();

 private:
  void close_oldest_file();

  std::vector<Segment> segments_;
  std::map<SegmentId, uint32_t> numbers_;  // of those that are not gone
  size_t open_files_ = 0;
  uint64_t uses_ = 0;
};

}  // namespace torchcache::store

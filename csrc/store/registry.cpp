#include "store/registry.h"

#include <algorithm>
#include <utility>

namespace torchcache::store {

namespace {
constexpr size_t kMaxOpenFiles = 128;
}  // namespace

uint32_t SegmentRegistry::add(const SegmentId& id) {
  const uint32_t number = static_cast<uint32_t>(segments_.size());
  Segment segment;
  segment.id = id;
  segment.changed = Clock::now();
  segments_.push_back(std::move(segment));
  numbers_[id] = number;
  return number;
}

std::optional<uint32_t> SegmentRegistry::find(const SegmentId& id) const {
  const auto position = numbers_.find(id);
  return position == numbers_.end() ? std::nullopt : std::optional(position->second);
}

void SegmentRegistry::remove(uint32_t number) {
  segments_[number].gone = true;
  numbers_.erase(segments_[number].id);
  close_file(number);
}

void SegmentRegistry::disown_all() {
  for (Segment& segment : segments_) segment.own = false;
}

std::vector<uint32_t> SegmentRegistry::missing_from(const std::vector<SegmentId>& listed) const {
  std::vector<uint32_t> missing;
  for (uint32_t number = 0; number < segments_.size(); ++number) {
    const Segment& segment = segments_[number];
    if (segment.own || segment.gone) continue;
    if (!std::binary_search(listed.begin(), listed.end(), segment.id)) missing.push_back(number);
  }
  return missing;
}

std::shared_ptr<File> SegmentRegistry::file(uint32_t number) {
  segments_[number].last_use = ++uses_;
  return segments_[number].file;
}

void SegmentRegistry::set_file(uint32_t number, std::shared_ptr<File> file) {
  Segment& segment = segments_[number];
  if (segment.file != nullptr || segment.gone) return;
  if (open_files_ >= kMaxOpenFiles) close_oldest_file();
  segment.file = std::move(file);
  ++open_files_;
}

void SegmentRegistry::close_file(uint32_t number) {
  if (segments_[number].file == nullptr) return;
  segments_[number].file.reset();
  --open_files_;
}

void SegmentRegistry::close_all_files() {
  for (uint32_t number = 0; number < segments_.size(); ++number) close_file(number);
}

void SegmentRegistry::close_oldest_file() {
  const auto older = [](const Segment& a, const Segment& b) {
    return a.file != nullptr && (b.file == nullptr || a.last_use < b.last_use);
  };
  const auto oldest = std::min_element(segments_.begin(), segments_.end(), older);
  close_file(static_cast<uint32_t>(oldest - segments_.begin()));
}

}  // namespace torchcache::store

#include "store/state.h"

#include <cerrno>

namespace torchcache::store {

void State::warn(const std::string& text) {
  constexpr size_t kMaxWarnings = 100;
  if (warned.size() < kMaxWarnings && warned.insert(text).second) warnings.push_back(text);
}

void State::warn(const std::string& what, Error error) {
  warn(what + " " + options.directory + ": " + error_text(error));
}

void State::warn_of_damage(const Segment& segment) {
  warn("damaged rows in " + segment_path(options.directory, segment.id) + " are left out: they will be computed again");
}

void State::remove_segment(uint32_t number) {
  segments.remove(number);
  index.drop_segment(number);
}

std::shared_ptr<File> open_segment_file(State& state, uint32_t number, Error* error) {
  std::string path;
  *error = 0;
  {
    core::MutexLock lock(state.mutex);
    if (auto file = state.segments.file(number)) return file;
    path = segment_path(state.options.directory, state.segments[number].id);
  }
  const uint64_t mapped_bytes = state.options.mmap ? kMaxSegmentBytes : 0;
  auto file = File::open(path, mapped_bytes, error);
  core::MutexLock lock(state.mutex);
  if (file == nullptr && (*error == EMFILE || *error == ENFILE)) {
    state.segments.close_all_files();
    file = File::open(path, mapped_bytes, error);
  }
  if (file != nullptr && !state.closed) state.segments.set_file(number, file);
  return file;
}

}  // namespace torchcache::store

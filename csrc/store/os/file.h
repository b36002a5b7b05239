// Files and directories as the store uses them: whole transfers or an error, never an exception.
// The system calls go through one table, so that tests can make each of them fail.
#pragma once

#include <dirent.h>
#include <sys/stat.h>
#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace torchcache::store {

// An errno; 0 is success. A transfer that ends early because the file does is kShortFile.
using Error = int;
constexpr Error kShortFile = -1;
constexpr Error kNotRegular = -2;
std::string error_text(Error error);
// Whether a file that was there is no longer, or never was.
bool is_gone(Error error);

// What tests may replace, before a store is opened.
struct SystemCalls {
  int (*open)(const char* path, int flags, mode_t mode);
  int (*fstat)(int fd, struct stat* out);
  ssize_t (*pread)(int fd, void* out, size_t size, off_t offset);
  ssize_t (*pwritev)(int fd, const struct iovec* parts, int count, off_t offset);
  int (*ftruncate)(int fd, off_t size);
  int (*fsync)(int fd);
  int (*lstat)(const char* path, struct stat* out);
  DIR* (*opendir)(const char* path);
  int (*mkdir)(const char* path, mode_t mode);
  int (*rename)(const char* from, const char* to);
};
extern SystemCalls system_calls;

// What tells that a file changed.
struct FileState {
  uint64_t size = 0;
  int64_t modified = 0;  // nanoseconds of the file system's clock, only ever compared for equality
  uint64_t links = 0;
  friend bool operator==(const FileState& a, const FileState& b) {
    return a.size == b.size && a.modified == b.modified;
  }
};

// A range of a file, and where its bytes are to go.
struct Transfer {
  uint8_t* out;
  uint64_t size;
  uint64_t offset;
  Error error = 0;
};

// An open regular file. Thread-safe; closed when the last owner lets go.
class File {
 public:
  // For reading, never through a symbolic link, never blocking. Reads of the first `mapped_bytes` copy from a mapping
  // where the system allows it. Null and an error if the file cannot be opened.
  static std::shared_ptr<File> open(const std::string& path, uint64_t mapped_bytes, Error* error);
  // For writing; the file must not exist. Holds an advisory lock as long as the file is open.
  static std::shared_ptr<File> create(const std::string& path, Error* error);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // Exactly `size` bytes at `offset`, or an error.
  Error read(void* out, uint64_t size, uint64_t offset) const;
  // The same for each of them; says in each how it went.
  void read(Transfer* transfers, size_t n) const;
  // All parts, one after another, at `offset`, or an error after a part of them. Alters `parts`.
  Error write(std::vector<iovec> parts, uint64_t offset) const;
  Error state(FileState* state) const;
  Error truncate(uint64_t size) const;
  Error sync() const;
  bool on_network() const;

  // Only in a forked child, for a file that is its parent's: closes it and leaves the rest.
  void abandon();

 private:
  explicit File(int fd) : fd_(fd) {}
  void map(uint64_t bytes);
  size_t copy_mapped(const Transfer* transfers, size_t n) const;
  Error read_file(uint8_t* out, uint64_t size, uint64_t offset) const;

  int fd_;
  // Reaches beyond the end of the file: a growing file needs no new mapping, and what is not there is an error of
  // process_vm_readv rather than a signal.
  uint8_t* mapping_ = nullptr;
  uint64_t mapped_bytes_ = 0;
};

// The state of what the path names, itself and not what a symbolic link points to.
Error path_state(const std::string& path, FileState* state);

// The names in a directory, also those that were read before an error.
Error list_directory(const std::string& directory, std::vector<std::string>* names);
Error make_directories(const std::string& directory);
// Removes a regular file unless a process holds its lock.
void remove_unlocked(const std::string& path);
void fill_random(uint8_t* out, size_t size);

}  // namespace torchcache::store

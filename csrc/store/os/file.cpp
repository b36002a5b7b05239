// POSIX files: open rules, loops over short transfers and interruptions, copies out of mappings.
#include "store/os/file.h"

#include <fcntl.h>
#include <limits.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <random>

namespace torchcache::store {
namespace {

// Not ::pread, which is a cancellation point: leaving one and coming back costs a tenth of reading a small row.
ssize_t read_at(int fd, void* out, size_t size, off_t offset) {
#if defined(__LP64__)
  return ::syscall(SYS_pread64, fd, out, size, offset);
#else
  return ::pread(fd, out, size, offset);
#endif
}

int open_file(const char* path, int flags, mode_t mode) { return ::open(path, flags, mode); }

constexpr int kOpenFlags = O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;

bool lock_file(int fd) {
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  return ::fcntl(fd, F_OFD_SETLK, &lock) == 0;
}

FileState to_state(const struct stat& s) {
  return {static_cast<uint64_t>(s.st_size), s.st_mtim.tv_sec * int64_t{1000000000} + s.st_mtim.tv_nsec, s.st_nlink};
}

Error regular_state(int fd, FileState* state) {
  struct stat s;
  if (system_calls.fstat(fd, &s) != 0) return errno;
  if (!S_ISREG(s.st_mode)) return kNotRegular;
  *state = to_state(s);
  return 0;
}

}  // namespace

SystemCalls system_calls = {open_file, ::fstat, read_at,   ::pwritev, ::ftruncate,
                            ::fsync,   ::lstat, ::opendir, ::mkdir,   ::rename};

std::string error_text(Error error) {
  if (error == kShortFile) return "the file ends early";
  if (error == kNotRegular) return "not a regular file";
  char text[256];
  return strerror_r(error, text, sizeof text);
}

bool is_gone(Error error) { return error == ENOENT || error == ESTALE; }

std::shared_ptr<File> File::open(const std::string& path, uint64_t mapped_bytes, Error* error) {
  const int fd = system_calls.open(path.c_str(), O_RDONLY | kOpenFlags, 0);
  if (fd < 0) {
    *error = errno;
    return nullptr;
  }
  std::shared_ptr<File> file(new File(fd));
  FileState state;
  *error = file->state(&state);
  if (*error != 0) return nullptr;
  if (mapped_bytes > 0) file->map(mapped_bytes);
  return file;
}

std::shared_ptr<File> File::create(const std::string& path, Error* error) {
  const int fd = system_calls.open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | kOpenFlags, 0666);
  *error = fd < 0 ? errno : 0;
  if (fd < 0) return nullptr;
  lock_file(fd);  // where locks do not work, maintenance goes by age
  return std::shared_ptr<File>(new File(fd));
}

File::~File() {
  if (mapping_ != nullptr) ::munmap(mapping_, mapped_bytes_);
  if (fd_ >= 0) ::close(fd_);
}

void File::abandon() {
  ::close(fd_);
  fd_ = -1;
}

void File::map(uint64_t bytes) {
  void* address = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED | MAP_NORESERVE, fd_, 0);
  if (address == MAP_FAILED) return;
  mapping_ = static_cast<uint8_t*>(address);
  mapped_bytes_ = bytes;
}

Error File::read(void* out, uint64_t size, uint64_t offset) const {
  Transfer transfer{static_cast<uint8_t*>(out), size, offset};
  read(&transfer, 1);
  return transfer.error;
}

void File::read(Transfer* transfers, size_t n) const {
  for (size_t i = 0; i < n; ++i) {
    if (mapping_ != nullptr) i += copy_mapped(transfers + i, n - i);
    if (i < n) transfers[i].error = read_file(transfers[i].out, transfers[i].size, transfers[i].offset);
  }
}

// How many of the first ones are done: it stops at one that passes the end of the file.
size_t File::copy_mapped(const Transfer* transfers, size_t n) const {
  constexpr size_t kAtOnce = 64;  // the system copies small lists without asking for memory
  iovec to[kAtOnce], from[kAtOnce];
  size_t done = 0;
  while (done < n) {
    size_t count = 0;
    for (; count < kAtOnce && done + count < n; ++count) {
      const Transfer& t = transfers[done + count];
      if (t.size == 0 || t.size > mapped_bytes_ || t.offset > mapped_bytes_ - t.size) break;
      to[count] = {t.out, t.size};
      from[count] = {mapping_ + t.offset, t.size};
    }
    if (count == 0) break;
    ssize_t copied = ::process_vm_readv(::getpid(), to, count, from, count, 0);
    size_t whole = 0;
    for (; whole < count && copied >= static_cast<ssize_t>(to[whole].iov_len); ++whole)
      copied -= static_cast<ssize_t>(to[whole].iov_len);
    done += whole;
    if (whole < count) break;
  }
  return done;
}

Error File::read_file(uint8_t* out, uint64_t size, uint64_t offset) const {
  while (size > 0) {
    const ssize_t n = system_calls.pread(fd_, out, size, static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno;
    if (n == 0) return kShortFile;
    out += n;
    offset += static_cast<uint64_t>(n);
    size -= static_cast<uint64_t>(n);
  }
  return 0;
}

Error File::write(std::vector<iovec> parts, uint64_t offset) const {
  for (size_t first = 0; first < parts.size();) {
    if (parts[first].iov_len == 0) {
      ++first;
      continue;
    }
    const int count = static_cast<int>(std::min<size_t>(parts.size() - first, IOV_MAX));
    const ssize_t n = system_calls.pwritev(fd_, &parts[first], count, static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return n < 0 ? errno : ENOSPC;
    offset += static_cast<uint64_t>(n);
    for (size_t left = static_cast<size_t>(n); left > 0;) {
      iovec& part = parts[first];
      const size_t done = std::min(left, part.iov_len);
      part.iov_base = static_cast<uint8_t*>(part.iov_base) + done;
      part.iov_len -= done;
      left -= done;
      if (part.iov_len == 0) ++first;
    }
  }
  return 0;
}

Error File::state(FileState* state) const { return regular_state(fd_, state); }

Error File::truncate(uint64_t size) const {
  return system_calls.ftruncate(fd_, static_cast<off_t>(size)) == 0 ? 0 : errno;
}

Error File::sync() const { return system_calls.fsync(fd_) == 0 ? 0 : errno; }

bool File::on_network() const {
  // NFS, SMB, CIFS, SMB2, Lustre, GPFS, Ceph, AFS, 9P, BeeGFS, FUSE: statfs(2), linux/magic.h
  constexpr uint32_t kNetwork[] = {0x6969,     0x517B,     0xFF534D42, 0xFE534D42, 0x0BD00BD0, 0x47504653,
                                   0x00C36400, 0x5346414F, 0x01021997, 0x19830326, 0x65735546};
  struct statfs s;
  if (::fstatfs(fd_, &s) != 0) return false;
  const uint32_t type = static_cast<uint32_t>(s.f_type);
  return std::find(std::begin(kNetwork), std::end(kNetwork), type) != std::end(kNetwork);
}

Error path_state(const std::string& path, FileState* state) {
  struct stat s;
  if (system_calls.lstat(path.c_str(), &s) != 0) return errno;
  *state = to_state(s);
  return S_ISREG(s.st_mode) ? 0 : kNotRegular;
}

Error list_directory(const std::string& directory, std::vector<std::string>* names) {
  DIR* stream = system_calls.opendir(directory.c_str());
  if (stream == nullptr) return errno;
  errno = 0;
  while (const dirent* entry = ::readdir(stream)) {
    names->emplace_back(entry->d_name);
    errno = 0;
  }
  const Error error = errno;
  ::closedir(stream);
  return error;
}

void remove_unlocked(const std::string& path) {
  const int fd = system_calls.open(path.c_str(), O_RDWR | kOpenFlags, 0);
  if (fd < 0) return;
  FileState state;
  if (regular_state(fd, &state) == 0 && lock_file(fd)) ::unlink(path.c_str());
  ::close(fd);
}

Error make_directories(const std::string& directory) {
  for (size_t slash = directory.find('/', 1);; slash = directory.find('/', slash + 1)) {
    const std::string part = directory.substr(0, slash);
    if (system_calls.mkdir(part.c_str(), 0777) != 0 && errno != EEXIST) return errno;
    if (slash == std::string::npos) break;
  }
  struct stat s;
  if (::stat(directory.c_str(), &s) != 0) return errno;
  return S_ISDIR(s.st_mode) ? 0 : ENOTDIR;
}

void fill_random(uint8_t* out, size_t size) {
  if (::getrandom(out, size, 0) == static_cast<ssize_t>(size)) return;
  std::random_device device;
  std::generate_n(out, size, [&] { return static_cast<uint8_t>(device()); });
}

}  // namespace torchcache::store

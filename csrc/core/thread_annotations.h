// Says which mutex guards what, for clang's analysis (`make lint`); other compilers ignore it.
// https://clang.llvm.org/docs/ThreadSafetyAnalysis.html
#pragma once

#if defined(__clang__)
#define TORCHCACHE_ANNOTATION(x) __attribute__((x))
#else
#define TORCHCACHE_ANNOTATION(x)
#endif

#define TORCHCACHE_CAPABILITY(name) TORCHCACHE_ANNOTATION(capability(name))
#define TORCHCACHE_SCOPED_CAPABILITY TORCHCACHE_ANNOTATION(scoped_lockable)
#define TORCHCACHE_GUARDED_BY(mutex) TORCHCACHE_ANNOTATION(guarded_by(mutex))
#define TORCHCACHE_REQUIRES(mutex) TORCHCACHE_ANNOTATION(requires_capability(mutex))  // the caller holds it
#define TORCHCACHE_EXCLUDES(mutex) TORCHCACHE_ANNOTATION(locks_excluded(mutex))       // the caller does not
#define TORCHCACHE_ACQUIRE(...) TORCHCACHE_ANNOTATION(acquire_capability(__VA_ARGS__))
#define TORCHCACHE_RELEASE(...) TORCHCACHE_ANNOTATION(release_capability(__VA_ARGS__))
#define TORCHCACHE_ASSERT_HELD(mutex) TORCHCACHE_ANNOTATION(assert_capability(mutex))
#define TORCHCACHE_NO_THREAD_ANALYSIS TORCHCACHE_ANNOTATION(no_thread_safety_analysis)

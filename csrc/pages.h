// Memory that is fresh from the system: huge pages, and stores around the cache.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace normally {

// Ask for huge pages before the first touch of a large output. A page fault costs about as much as
// writing the 4 KB it maps (48 MB: 23 ms in small pages, 3 ms in huge ones).
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  if (bytes < int64_t{4} << 20) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHuge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Bring `bytes` from `data` towards the cache while something else is computed.
inline void prefetch(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

inline int64_t last_level_cache() {
  static const int64_t bytes = [] {
    int64_t size = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    size = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return size > 0 ? size : int64_t{32} << 20;
  }();
  return bytes;
}

// Whether an output of this size leaves the cache before anyone reads it: then writing around the
// cache saves reading its lines first (10-15 % of a forward). In training the input stays there
// beside it, for the second sweep and the backward; in evaluation a smaller output may well lie in
// memory that the allocator reuses and the cache still holds.
inline bool worth_streaming(int64_t bytes, bool training) {
  return (training ? 2 * bytes : bytes) >= last_level_cache();
}

inline void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace normally

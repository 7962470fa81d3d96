// Saved bits: one an element, lowest first, the rows of a walk padded to whole bytes.
#pragma once

#include "lanes.h"

namespace normally {

// Bits of the lanes at element `i` of a row, `count` of them; i is a multiple of the lanes.
template <typename T>
inline void write_bits(uint8_t* row, int64_t i, uint32_t bits, int64_t count) {
  constexpr int kWidth = kLanes<T>;
  if (count < kWidth) bits &= (1u << count) - 1;
  uint8_t* p = row + i / 8;
  if constexpr (kWidth == 16) {
    p[0] = static_cast<uint8_t>(bits);
    if (count > 8) p[1] = static_cast<uint8_t>(bits >> 8);
  } else if constexpr (kWidth == 8) {
    p[0] = static_cast<uint8_t>(bits);
  } else {
    const int shift = static_cast<int>(i % 8);
    p[0] = static_cast<uint8_t>(shift ? p[0] | bits << shift : bits);
  }
}

template <typename T>
inline uint32_t read_bits(const uint8_t* row, int64_t i, int64_t count) {
  constexpr int kWidth = kLanes<T>;
  const uint8_t* p = row + i / 8;
  if constexpr (kWidth == 16) {
    return count > 8 ? p[0] | uint32_t{p[1]} << 8 : p[0];
  } else if constexpr (kWidth == 8) {
    return p[0];
  } else {
    return p[0] >> (i % 8);
  }
}

inline void write_bit(uint8_t* row, int64_t i, bool value) {
  const unsigned bit = 1u << (i % 8);
  row[i / 8] = static_cast<uint8_t>(value ? row[i / 8] | bit : row[i / 8] & ~bit);
}

inline bool read_bit(const uint8_t* row, int64_t i) { return row[i / 8] >> (i % 8) & 1; }

}  // namespace normally

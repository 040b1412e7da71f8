// The bitmap format and its kernels: one bit a weight says whether it is there, and the non-zeros follow each other.
//
// A matrix has `rows` (outputs) and `columns` (inputs), and W = ceil(columns / 64) words a row.
//   mask     (rows, W) uint64; bit j of word w of a row is column 64 w + j; bits past the last column are 0
//   offsets  (rows + 1) int32; the non-zeros of row r are values[offsets[r]] .. values[offsets[r + 1] - 1]
//   values   float or bfloat16 (as uint16_t), followed by PADDING bytes that may be read and are not used
//
// No torch in here: binding.cpp puts it behind tensors, and a test compiles it alone under sanitizers. Every version of
// a kernel is compiled into the same library by target attributes, and the processor decides at run time.
//
// Vector versions multiply a weight that is not there as 0, as a dense product does, so that infinite inputs give NaN
// in both.

#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define SWEEP_X86 1
#include <immintrin.h>
#endif

namespace sweep {

using bf16 = uint16_t;              // the upper half of a float
constexpr int64_t WORD = 64;        // columns a mask word
constexpr int64_t PADDING = 64;     // bytes after the values: the widest load
constexpr int MAX_TOKENS = 8;       // inputs that one pass over the matrix serves
constexpr int64_t AHEAD = 1024;     // bytes between the values in use and those asked of memory

template <class T>
struct Matrix {
  int64_t rows, columns, words;
  const uint64_t* mask;
  const int32_t* offsets;
  const T* values;
};

inline float widen(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
inline float widen(float value) { return value; }

// Round to the nearest, ties to even; NaN stays NaN.
inline void narrow(float value, bf16* result) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    *result = static_cast<bf16>((bits >> 16) | 0x40u);
  else
    *result = static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void narrow(float value, float* result) { *result = value; }

// The same for what is no NaN, without the branch, which keeps a compiler from rounding many at a time.
inline __attribute__((always_inline)) void narrow_finite(float value, bf16* result) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  *result = static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline __attribute__((always_inline)) void narrow_finite(float value, float* result) { *result = value; }

// An input as floats, with zeros up to `padded` columns.
template <class T>
void widen_all(const T* x, int64_t columns, int64_t padded, float* to) {
  for (int64_t c = 0; c < columns; ++c) to[c] = widen(x[c]);
  std::fill(to + columns, to + padded, 0.0f);
}

// A weight as it is, or as a float.
inline void put(bf16 value, bf16* to) { *to = value; }
template <class T>
void put(T value, float* to) {
  *to = widen(value);
}

// products(matrix, x, out, begin, end): out[n * rows + r] = sum over columns of W[r, c] * x[n, c] in float, for N inputs
// x as `prepare` leaves them (words * 64 elements each) and rows begin <= r < end.
// expand(matrix, dense, begin, end): the rows as a dense matrix of `columns` columns, in the type of the values or float.

template <class T>
struct Portable {
  template <int N>
  static void products(const Matrix<T>& m, const float* x, float* out, int64_t begin, int64_t end) {
    const int64_t stride = m.words * WORD;
    for (int64_t r = begin; r < end; ++r) {
      const uint64_t* mask = m.mask + r * m.words;
      const T* value = m.values + m.offsets[r];
      float sum[N] = {};
      for (int64_t w = 0; w < m.words; ++w)
        for (uint64_t bits = mask[w]; bits; bits &= bits - 1) {
          const float weight = widen(*value++);
          const float* at = x + w * WORD + __builtin_ctzll(bits);
          for (int n = 0; n < N; ++n) sum[n] += weight * at[n * stride];
        }
      for (int n = 0; n < N; ++n) out[n * m.rows + r] = sum[n];
    }
  }

  template <class To>
  static void expand(const Matrix<T>& m, To* dense, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const uint64_t* mask = m.mask + r * m.words;
      const T* value = m.values + m.offsets[r];
      To* row = dense + (r - begin) * m.columns;
      std::fill(row, row + m.columns, To(0));
      for (int64_t w = 0; w < m.words; ++w)
        for (uint64_t bits = mask[w]; bits; bits &= bits - 1) put(*value++, row + w * WORD + __builtin_ctzll(bits));
    }
  }
};

#ifdef SWEEP_X86

// ---- AVX2: eight columns at a time; a table turns eight mask bits into the shuffle that spreads the values -----------

struct Spread {
  alignas(32) uint8_t widened[256][32];  // byte shuffle that puts eight 16-bit values into the upper halves of 32 bits
  alignas(16) uint8_t words[256][16];    // byte shuffle for eight 16-bit values; 0x80 gives zero, here and above
  int8_t lanes[256][8];                  // lane of each of eight 32-bit values; -1 for zero
};

constexpr Spread make_spread() {
  Spread s{};
  for (int bits = 0; bits < 256; ++bits) {
    int next = 0;
    for (int j = 0; j < 8; ++j) {
      const bool there = (bits >> j) & 1;
      for (int k = 0; k < 2; ++k) {
        const uint8_t byte = there ? static_cast<uint8_t>(2 * next + k) : 0x80;
        s.words[bits][2 * j + k] = byte;
        s.widened[bits][4 * j + k] = 0x80;
        s.widened[bits][4 * j + 2 + k] = byte;
      }
      s.lanes[bits][j] = there ? static_cast<int8_t>(next) : static_cast<int8_t>(-1);
      next += there;
    }
  }
  return s;
}
inline constexpr Spread SPREAD = make_spread();

#define SWEEP_AVX2 __attribute__((target("avx2,fma,popcnt")))

// Eight weights as floats.
SWEEP_AVX2 inline __m256 spread(const float* value, unsigned bits) {
  const __m256i lane = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(SPREAD.lanes[bits])));
  const __m256 there = _mm256_permutevar8x32_ps(_mm256_loadu_ps(value), lane);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(lane, 31)), there);
}
SWEEP_AVX2 inline __m256 spread(const bf16* value, unsigned bits) {
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(value)));
  const __m256i shuffle = _mm256_load_si256(reinterpret_cast<const __m256i*>(SPREAD.widened[bits]));
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, shuffle));
}

template <class T>
SWEEP_AVX2 void store8(float* to, const T* value, unsigned bits) {
  _mm256_storeu_ps(to, spread(value, bits));
}
SWEEP_AVX2 inline void store8(bf16* to, const bf16* value, unsigned bits) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(value));
  const __m128i shuffle = _mm_load_si128(reinterpret_cast<const __m128i*>(SPREAD.words[bits]));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(packed, shuffle));
}

SWEEP_AVX2 inline float total(__m256 v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

template <class T>
struct Avx2 {
  template <int N>
  SWEEP_AVX2 static void products(const Matrix<T>& m, const float* x, float* out, int64_t begin, int64_t end) {
    const int64_t stride = m.words * WORD;
    constexpr int WAYS = N == 1 ? 4 : N == 2 ? 2 : 1;  // sums side by side hide the latency of the additions
    for (int64_t r = begin; r < end; ++r) {
      const uint64_t* mask = m.mask + r * m.words;
      const T* value = m.values + m.offsets[r];
      __m256 sum[N][WAYS];
      for (int n = 0; n < N; ++n)
        for (int i = 0; i < WAYS; ++i) sum[n][i] = _mm256_setzero_ps();
      for (int64_t w = 0; w < m.words; ++w) {
        const uint64_t bits = mask[w];
        const float* at = x + w * WORD;
        _mm_prefetch(reinterpret_cast<const char*>(value) + AHEAD, _MM_HINT_T0);
        if (sizeof(T) == sizeof(float)) _mm_prefetch(reinterpret_cast<const char*>(value) + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {  // each finds its values by itself and need not wait for the one before
          const unsigned eight = (bits >> (8 * j)) & 0xff;
          const __m256 weight = spread(value + _mm_popcnt_u64(bits & ((uint64_t{1} << (8 * j)) - 1)), eight);
          for (int n = 0; n < N; ++n)
            sum[n][j % WAYS] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(at + n * stride + 8 * j), sum[n][j % WAYS]);
        }
        value += _mm_popcnt_u64(bits);
      }
      for (int n = 0; n < N; ++n) {
        for (int i = 1; i < WAYS; ++i) sum[n][0] = _mm256_add_ps(sum[n][0], sum[n][i]);
        out[n * m.rows + r] = total(sum[n][0]);
      }
    }
  }

  template <class To>
  SWEEP_AVX2 static void expand(const Matrix<T>& m, To* dense, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const uint64_t* mask = m.mask + r * m.words;
      const T* value = m.values + m.offsets[r];
      To* row = dense + (r - begin) * m.columns;
      for (int64_t c = 0; c < m.columns; c += 8) {
        const unsigned eight = (mask[c / WORD] >> (c % WORD)) & 0xff;
        if (c + 8 <= m.columns) {
          store8(row + c, value, eight);
        } else {
          To last[8];
          store8(last, value, eight);
          std::copy(last, last + (m.columns - c), row + c);
        }
        value += _mm_popcnt_u32(eight);
      }
    }
  }
};

// ---- AVX-512: 32 (bfloat16) or 16 (float) columns at a time ------------------------------------------------------------

#define SWEEP_512 "avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bitalg,avx512vpopcntdq,avx2,fma,popcnt"
#define SWEEP_AVX512 __attribute__((target(SWEEP_512)))
#define SWEEP_AVX512_BF16 __attribute__((target(SWEEP_512 ",avx512bf16")))

// The expand instructions take 2.5 (words) and 1.7 (lanes) cycles on Zen 5, permutations half a cycle. So the products
// compute where each lane's value lies, which is the number of weights before it: popcount(mask & (bits below)).
// From a register, because expanding from memory is slower still on some processors.
SWEEP_AVX512 inline __m512i expand32(const bf16* value, uint32_t bits) {
  return _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(value));
}
SWEEP_AVX512 inline __m512 expand16(const float* value, uint32_t bits) {
  return _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), _mm512_loadu_ps(value));
}

// Zero-masked forms with a full mask, here and below: GCC 12 warns that its own header's plain ones are uninitialised.
template <int HALF>
SWEEP_AVX512 inline __m256i half(__m512i v) {
  return _mm512_maskz_extracti64x4_epi64(0xff, v, HALF);
}
SWEEP_AVX512 inline float total(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  return total(_mm256_add_ps(_mm256_castsi256_ps(half<0>(bits)), _mm256_castsi256_ps(half<1>(bits))));
}
// Each of 16 lanes: the weights before it, of the 16 columns whose bits are the low or, with UPPER, the high half.
template <bool UPPER>
SWEEP_AVX512 inline __m512i before(__m512i bits) {
  constexpr int S = UPPER ? 16 : 0;
  const __m512i below = _mm512_set_epi32(
      0x7fff << S, 0x3fff << S, 0x1fff << S, 0xfff << S, 0x7ff << S, 0x3ff << S, 0x1ff << S, 0xff << S, 0x7f << S,
      0x3f << S, 0x1f << S, 0xf << S, 7 << S, 3 << S, 1 << S, 0);
  return _mm512_maskz_popcnt_epi32(0xffff, _mm512_and_si512(bits, below));
}

// Sixteen weights as floats, 0 where `there` has no bit. A bfloat16 moves into the upper half of its lane.
SWEEP_AVX512 inline __m512 weights16(const float* value, __m512i index, __mmask16 there) {
  return _mm512_maskz_permutexvar_ps(there, index, _mm512_loadu_ps(value));
}
SWEEP_AVX512 inline __m512 weights16(const bf16* value, __m512i index, __mmask16 there) {
  const __m512i packed = _mm512_maskz_loadu_epi64(0x0f, value);
  return _mm512_castsi512_ps(
      _mm512_maskz_slli_epi32(there, _mm512_maskz_permutexvar_epi16(0xffffffff, index, packed), 16));
}

SWEEP_AVX512 inline void store_spread(float* to, const float* value, uint32_t bits) {
  _mm512_storeu_ps(to, expand16(value, bits));
}
SWEEP_AVX512 inline void store_spread(bf16* to, const bf16* value, uint32_t bits) {
  _mm512_storeu_si512(to, expand32(value, bits));
}

template <class T>
struct Avx512 {
  template <int N>
  SWEEP_AVX512 static void products(const Matrix<T>& m, const float* x, float* out, int64_t begin, int64_t end) {
    const int64_t stride = m.words * WORD;
    constexpr int WAYS = N == 1 ? 4 : N <= 4 ? 2 : 1;
    for (int64_t r = begin; r < end; ++r) {
      const uint64_t* mask = m.mask + r * m.words;
      const T* value = m.values + m.offsets[r];
      __m512 sum[N][WAYS];
      for (int n = 0; n < N; ++n)
        for (int i = 0; i < WAYS; ++i) sum[n][i] = _mm512_setzero_ps();
      for (int64_t w = 0; w < m.words; ++w) {
        const float* at = x + w * WORD;
        _mm_prefetch(reinterpret_cast<const char*>(value) + AHEAD, _MM_HINT_T0);
        if (sizeof(T) == sizeof(float)) _mm_prefetch(reinterpret_cast<const char*>(value) + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          const uint32_t part = static_cast<uint32_t>(mask[w] >> (32 * j));
          const __m512i bits = _mm512_set1_epi32(static_cast<int>(part));
          const __m512 low = weights16(value, before<false>(bits), static_cast<__mmask16>(part));
          const __m512 high = weights16(value + _mm_popcnt_u32(part & 0xffff), before<true>(bits),
                                        static_cast<__mmask16>(part >> 16));
          value += _mm_popcnt_u32(part);
          for (int n = 0; n < N; ++n) {
            const float* input = at + n * stride + 32 * j;
            __m512& first = sum[n][(2 * j) % WAYS];
            first = _mm512_fmadd_ps(low, _mm512_loadu_ps(input), first);
            __m512& second = sum[n][(2 * j + 1) % WAYS];
            second = _mm512_fmadd_ps(high, _mm512_loadu_ps(input + 16), second);
          }
        }
      }
      for (int n = 0; n < N; ++n) {
        for (int i = 1; i < WAYS; ++i) sum[n][0] = _mm512_add_ps(sum[n][0], sum[n][i]);
        out[n * m.rows + r] = total(sum[n][0]);
      }
    }
  }

  // Whole words with plain stores, since masked ones are far slower; the columns after them by way of a buffer.
  SWEEP_AVX512 static void expand(const Matrix<T>& m, T* dense, int64_t begin, int64_t end) {
    constexpr int64_t STEP = 64 / sizeof(T);
    const int64_t whole = m.columns / WORD;
    for (int64_t r = begin; r < end; ++r) {
      const uint64_t* mask = m.mask + r * m.words;
      const T* value = m.values + m.offsets[r];
      T* row = dense + (r - begin) * m.columns;
      for (int64_t w = 0; w < m.words; ++w) {
        T last[WORD];
        T* to = w < whole ? row + w * WORD : last;
        _mm_prefetch(reinterpret_cast<const char*>(value) + AHEAD, _MM_HINT_T0);
        if (sizeof(T) == sizeof(float)) _mm_prefetch(reinterpret_cast<const char*>(value) + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int64_t j = 0; j < WORD; j += STEP) {
          const uint32_t part = static_cast<uint32_t>(mask[w] >> j) & (STEP == 16 ? 0xffffu : ~0u);
          store_spread(to + j, value, part);
          value += _mm_popcnt_u32(part);
        }
        if (w == whole) std::copy(last, last + m.columns % WORD, row + w * WORD);
      }
    }
  }
};

// With the bfloat16 dot product the input stays bfloat16 too. It adds up pairs of lanes, in whichever order the columns
// lie, so the input is interleaved beforehand: of each 32 columns, column j goes to lane 2 j and column 16 + j to lane
// 2 j + 1. Then one broadcast of the 32 mask bits puts the right 16 of them in every lane.
struct Avx512Bf16 {
  template <int N>
  SWEEP_AVX512_BF16 static void products(const Matrix<bf16>& m, const bf16* x, float* out, int64_t begin, int64_t end) {
    const int64_t stride = m.words * WORD;
    constexpr int WAYS = N <= 4 ? 2 : 1;
    alignas(64) uint16_t lanes[3][32];
    for (int j = 0; j < 32; ++j) {
      lanes[0][j] = static_cast<uint16_t>((1u << (j / 2)) - 1u);  // mask bits before this lane's
      lanes[1][j] = static_cast<uint16_t>(1u << (j / 2));         // this lane's mask bit
      lanes[2][j] = j % 2 ? 16 : 0;                               // where its 16 columns' values start in the register
    }
    const __m512i below = _mm512_load_si512(lanes[0]), own = _mm512_load_si512(lanes[1]),
                  start = _mm512_load_si512(lanes[2]);
    for (int64_t r = begin; r < end; ++r) {
      const uint64_t* mask = m.mask + r * m.words;
      const bf16* value = m.values + m.offsets[r];
      __m512 sum[N][WAYS];
      for (int n = 0; n < N; ++n)
        for (int i = 0; i < WAYS; ++i) sum[n][i] = _mm512_setzero_ps();
      for (int64_t w = 0; w < m.words; ++w) {
        const bf16* at = x + w * WORD;
        _mm_prefetch(reinterpret_cast<const char*>(value) + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          const uint32_t part = static_cast<uint32_t>(mask[w] >> (32 * j));
          const __m512i bits = _mm512_set1_epi32(static_cast<int>(part));
          const __m512i index = _mm512_or_si512(_mm512_popcnt_epi16(_mm512_and_si512(bits, below)), start);
          const bf16* second = value + _mm_popcnt_u32(part & 0xffff);
          const __m512i packed = _mm512_maskz_inserti64x4(
              0xff,
              _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(value))),
              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)), 1);
          value += _mm_popcnt_u32(part);
          const __m512bh weight =
              (__m512bh)_mm512_maskz_permutexvar_epi16(_mm512_test_epi16_mask(bits, own), index, packed);
          for (int n = 0; n < N; ++n)
            sum[n][j % WAYS] = _mm512_dpbf16_ps(
                sum[n][j % WAYS], weight, (__m512bh)_mm512_loadu_si512(at + n * stride + 32 * j));
        }
      }
      for (int n = 0; n < N; ++n) {
        for (int i = 1; i < WAYS; ++i) sum[n][0] = _mm512_add_ps(sum[n][0], sum[n][i]);
        out[n * m.rows + r] = total(sum[n][0]);
      }
    }
  }
};

#endif  // SWEEP_X86

// ---- Choice at run time ------------------------------------------------------------------------------------------------

// The last one multiplies codes alone, which codes.h holds.
enum class Version : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, avx512_vnni = 4 };
constexpr std::array<const char*, 5> VERSION_NAMES{"portable", "avx2", "avx512", "avx512_bf16", "avx512_vnni"};

inline bool available(Version version) {
#ifdef SWEEP_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2") &&
                      __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("avx512vpopcntdq");
  switch (version) {
    case Version::portable: return true;
    case Version::avx2: return avx2;
    case Version::avx512: return avx512;
    case Version::avx512_bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
    case Version::avx512_vnni: return avx512 && __builtin_cpu_supports("avx512vnni");
  }
#endif
  return version == Version::portable;
}

// Whether this version reads its input as bfloat16, interleaved; every other reads floats in their order.
template <class T>
constexpr bool reads_bf16(Version version) {
  return sizeof(T) == sizeof(bf16) && version == Version::avx512_bf16;
}

// Bytes of one prepared input, whose elements are of type In: here always that of the values.
template <class In, class T>
int64_t prepared_bytes(Version version, const Matrix<T>& m) {
  return m.words * WORD * static_cast<int64_t>(reads_bf16<T>(version) ? sizeof(bf16) : sizeof(float));
}

// One input x of `columns` elements as the kernel reads it, with zeros past the last column.
template <class In, class T>
void prepare(Version version, const Matrix<T>& m, const In* x, void* to) {
  const int64_t padded = m.words * WORD;
  if (reads_bf16<T>(version)) {
    T* const out = static_cast<T*>(to);
    int64_t c = 0;
    for (; c + 32 <= m.columns; c += 32)
      for (int64_t j = 0; j < 16; ++j) {
        out[c + 2 * j] = x[c + j];
        out[c + 2 * j + 1] = x[c + 16 + j];
      }
    std::fill(out + c, out + padded, T(0));
    for (int64_t j = 0; c + j < m.columns; ++j) out[c + (j < 16 ? 2 * j : 2 * (j - 16) + 1)] = x[c + j];
  } else {
    widen_all(x, m.columns, padded, static_cast<float*>(to));
  }
}

template <class In, int N, class T>
void products_of(Version version, const Matrix<T>& m, const void* x, float* out, int64_t begin, int64_t end) {
#ifdef SWEEP_X86
  if constexpr (sizeof(T) == sizeof(bf16))
    if (version == Version::avx512_bf16)
      return Avx512Bf16::products<N>(m, static_cast<const bf16*>(x), out, begin, end);
  const float* input = static_cast<const float*>(x);
  if (version >= Version::avx512) return Avx512<T>::template products<N>(m, input, out, begin, end);
  if (version == Version::avx2) return Avx2<T>::template products<N>(m, input, out, begin, end);
#endif
  Portable<T>::template products<N>(m, static_cast<const float*>(x), out, begin, end);
}

// For 1 .. MAX_TOKENS inputs, and a matrix M of any kind.
template <class In, class M>
void products(Version version, int tokens, const M& m, const void* x, float* out, int64_t begin, int64_t end) {
  switch (tokens) {
    case 1: return products_of<In, 1>(version, m, x, out, begin, end);
    case 2: return products_of<In, 2>(version, m, x, out, begin, end);
    case 3: return products_of<In, 3>(version, m, x, out, begin, end);
    case 4: return products_of<In, 4>(version, m, x, out, begin, end);
    case 5: return products_of<In, 5>(version, m, x, out, begin, end);
    case 6: return products_of<In, 6>(version, m, x, out, begin, end);
    case 7: return products_of<In, 7>(version, m, x, out, begin, end);
    default: return products_of<In, 8>(version, m, x, out, begin, end);
  }
}

template <class T, class To>
void expand(Version version, const Matrix<T>& m, To* dense, int64_t begin, int64_t end) {
#ifdef SWEEP_X86
  if constexpr (std::is_same_v<T, To>)
    if (version >= Version::avx512) return Avx512<T>::expand(m, dense, begin, end);
  if (version >= Version::avx2) return Avx2<T>::expand(m, dense, begin, end);
#endif
  Portable<T>::expand(m, dense, begin, end);
}

template <class T>
int64_t bytes_before(const Matrix<T>& m, int64_t row) {
  return static_cast<int64_t>(sizeof(T)) * m.offsets[row] + row * m.words * static_cast<int64_t>(sizeof(uint64_t));
}

// The first row of part `part` of `parts` of the rows begin .. end, so that the parts have equal bytes: an empty row costs
// its mask alone.
template <class M>
int64_t first_row(const M& m, int64_t part, int64_t parts, int64_t begin, int64_t end) {
  if (part >= parts) return end;
  const int64_t first = bytes_before(m, begin);
  const int64_t wanted = first + (bytes_before(m, end) - first) / parts * part;
  int64_t low = begin, high = end;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (bytes_before(m, middle) < wanted)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

}  // namespace sweep

// Matrices of whole numbers, codes, with a scale a row or a group of columns, and their kernels.
//
// A matrix has `rows` (outputs) and `columns` (inputs), and W = ceil(columns / 64) words a row.
//   Codes<8>     codes (rows, 64 W) int8, 0 past the last column
//   Codes<4>     codes (rows, 32 W) uint8; byte j of a word has column j in its low half, 32 + j in the high one, plus 8
//   BitmapCodes  mask (rows, W) and offsets (rows + 1) as in bitmap.h; the codes that are not 0 follow each other, int8,
//                and after them PADDING bytes
//   scales       (rows, groups) float, bfloat16 or float16, finite; a group is 32, 64, 96 … columns, or the row
//
// A product is the sum of codes times inputs, times the scale, all in float: no weight is rounded to bfloat16. With the
// instructions for bytes (VNNI) that sum is exact: the input is first written as whole numbers of three bytes
// (bfloat16) or four (float), which rounds off at most 2^-23 or 2^-31 of the largest of them. A product in float loses as much. Inputs that are not finite make all products NaN there.

#pragma once

#include <limits>

#include "bitmap.h"

namespace sweep {

constexpr int64_t HALF = WORD / 2;  // columns that surely share a scale

struct Scales {
  enum Type { FLOAT, BF16, HALF_FLOAT } type;
  const void* at;
  float operator[](int64_t i) const {
    if (type == FLOAT) return static_cast<const float*>(at)[i];
    const uint16_t bits = static_cast<const uint16_t*>(at)[i];
    if (type == BF16) return widen(bits);
    const uint32_t wide = (bits & 0x7fffu) << 13;  // its exponent is 112 less than a float's
    float size;
    std::memcpy(&size, &wide, sizeof(size));
    return (bits & 0x8000u ? -0x1p112f : 0x1p112f) * size;
  }
};

template <int BITS>
struct Codes {
  int64_t rows, columns, words, group;  // group: columns a scale, 0 for the row
  const std::conditional_t<BITS == 8, int8_t, uint8_t>* codes;
  Scales scales;
};

struct BitmapCodes {
  int64_t rows, columns, words, group;
  const uint64_t* mask;
  const int32_t* offsets;
  const int8_t* codes;
  Scales scales;
};

template <int BITS>
int64_t bytes_before(const Codes<BITS>& m, int64_t row) {
  return row * m.words * WORD * BITS / 8;
}
inline int64_t bytes_before(const BitmapCodes& m, int64_t row) {
  return m.offsets[row] + row * m.words * static_cast<int64_t>(sizeof(uint64_t));
}

// The scales of a row, asked for one half of a word after the other: no division, which would take longer than a product.
struct RowScales {
  const Scales& scales;
  int64_t at, halves, left;
  template <class M>
  RowScales(const M& m, int64_t row)
      : scales(m.scales),
        at(m.group ? row * (m.columns / m.group) : row),
        halves(m.group ? m.group / HALF : m.words * 2),
        left(halves) {}
  float next() {
    const float scale = scales[at];
    if (--left == 0) ++at, left = halves;
    return scale;
  }
};

template <class M>
using if_codes = decltype(M::group);

// ---- Reading a row, 64 codes at a time: `next` says where they stand, in the buffer unless they lie so already ---------

struct Bytes {
  const int8_t* at;
  Bytes(const Codes<8>& m, int64_t row) : at(m.codes + row * m.words * WORD) {}
  const int8_t* next(int8_t*) {
    const int8_t* now = at;
    at += WORD;
    return now;
  }
};

struct Halves {
  const uint8_t* at;
  Halves(const Codes<4>& m, int64_t row) : at(m.codes + row * m.words * HALF) {}
  const int8_t* next(int8_t* buffer) {
    for (int j = 0; j < HALF; ++j) {
      buffer[j] = static_cast<int8_t>((at[j] & 15) - 8);
      buffer[HALF + j] = static_cast<int8_t>((at[j] >> 4) - 8);
    }
    at += HALF;
    return buffer;
  }
};

struct Scattered {
  const uint64_t* mask;
  const int8_t* at;
  Scattered(const BitmapCodes& m, int64_t row) : mask(m.mask + row * m.words), at(m.codes + m.offsets[row]) {}
  const int8_t* next(int8_t* buffer) {
    std::fill(buffer, buffer + WORD, int8_t{0});
    for (uint64_t bits = *mask++; bits; bits &= bits - 1) buffer[__builtin_ctzll(bits)] = *at++;
    return buffer;
  }
};

// One row as values, each rounded once; the last columns by way of a buffer.
template <class M, class Reader, class To>
inline __attribute__((always_inline)) void expand_row(const M& m, int64_t row, Reader reader, To* to) {
  alignas(64) int8_t buffer[WORD];
  To last[WORD];
  RowScales scales(m, row);
  for (int64_t w = 0; w < m.words; ++w) {
    const int8_t* codes = reader.next(buffer);
    const int64_t left = m.columns - w * WORD;
    To* out = left < WORD ? last : to + w * WORD;
    for (int64_t half = 0; half < std::min(left, WORD); half += HALF) {
      const float scale = scales.next();
      for (int64_t j = half; j < half + HALF; ++j) narrow_finite(scale * static_cast<float>(codes[j]), out + j);
    }
    if (left < WORD) std::copy(last, last + left, to + w * WORD);
  }
}

// ---- Products and expansion as in bitmap.h, of N inputs of floats ------------------------------------------------------

struct PortableCodes {
  static Bytes reader(const Codes<8>& m, int64_t row) { return {m, row}; }
  static Halves reader(const Codes<4>& m, int64_t row) { return {m, row}; }
  static Scattered reader(const BitmapCodes& m, int64_t row) { return {m, row}; }

  template <int N, class M>
  static void products(const M& m, const float* x, float* out, int64_t begin, int64_t end) {
    const int64_t stride = m.words * WORD;
    alignas(64) int8_t buffer[WORD];
    for (int64_t r = begin; r < end; ++r) {
      auto row = reader(m, r);
      RowScales scales(m, r);
      float sum[N] = {};
      for (int64_t w = 0; w < m.words; ++w) {
        const int8_t* codes = row.next(buffer);
        for (int64_t half = 0; half < std::min(m.columns - w * WORD, WORD); half += HALF) {
          const float scale = scales.next();
          for (int n = 0; n < N; ++n) {
            const float* at = x + n * stride + w * WORD;
            float part[4] = {};  // sums side by side, which a compiler may keep in one register
            for (int64_t j = half; j < half + HALF; j += 4)
              for (int i = 0; i < 4; ++i) part[i] += static_cast<float>(codes[j + i]) * at[j + i];
            sum[n] += scale * ((part[0] + part[1]) + (part[2] + part[3]));
          }
        }
      }
      for (int n = 0; n < N; ++n) out[n * m.rows + r] = sum[n];
    }
  }

  template <class M, class To>
  static void expand(const M& m, To* dense, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) expand_row(m, r, reader(m, r), dense + (r - begin) * m.columns);
  }
};

#ifdef SWEEP_X86

struct ScatteredAvx2 : Scattered {
  using Scattered::Scattered;
  SWEEP_AVX2 const int8_t* next(int8_t* buffer) {
    const uint64_t bits = *mask++;
    _mm_prefetch(reinterpret_cast<const char*>(at) + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const int8_t* eight = at + _mm_popcnt_u64(bits & ((uint64_t{1} << (8 * j)) - 1));
      const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(SPREAD.lanes[(bits >> (8 * j)) & 0xff]));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(buffer + 8 * j),
                       _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(eight)), lanes));
    }
    at += _mm_popcnt_u64(bits);
    return buffer;
  }
};

struct Avx2Codes {
  static Bytes reader(const Codes<8>& m, int64_t row) { return {m, row}; }
  static Halves reader(const Codes<4>& m, int64_t row) { return {m, row}; }
  static ScatteredAvx2 reader(const BitmapCodes& m, int64_t row) { return {m, row}; }

  template <int N, class M>
  SWEEP_AVX2 static void products(const M& m, const float* x, float* out, int64_t begin, int64_t end) {
    const int64_t stride = m.words * WORD;
    constexpr int WAYS = N == 1 ? 4 : N == 2 ? 2 : 1;
    alignas(64) int8_t buffer[WORD];
    for (int64_t r = begin; r < end; ++r) {
      auto row = reader(m, r);
      RowScales scales(m, r);
      const bool grouped = m.group != 0;
      __m256 sum[N][WAYS], scale = _mm256_setzero_ps();
      for (int n = 0; n < N; ++n)
        for (int i = 0; i < WAYS; ++i) sum[n][i] = _mm256_setzero_ps();
      for (int64_t w = 0; w < m.words; ++w) {
        const int8_t* codes = row.next(buffer);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
          const int64_t column = w * WORD + 8 * j;
          __m256 weight = _mm256_cvtepi32_ps(
              _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * j))));
          if (grouped) {
            if (j % 4 == 0 && column < m.columns) scale = _mm256_set1_ps(scales.next());
            weight = _mm256_mul_ps(weight, scale);
          }
          for (int n = 0; n < N; ++n)
            sum[n][j % WAYS] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(x + n * stride + column), sum[n][j % WAYS]);
        }
      }
      for (int n = 0; n < N; ++n) {
        for (int i = 1; i < WAYS; ++i) sum[n][0] = _mm256_add_ps(sum[n][0], sum[n][i]);
        out[n * m.rows + r] = total(sum[n][0]) * (grouped ? 1.0f : m.scales[r]);
      }
    }
  }

  template <class M, class To>
  SWEEP_AVX2 static void expand(const M& m, To* dense, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) expand_row(m, r, reader(m, r), dense + (r - begin) * m.columns);
  }
};

struct BytesAvx512 : Bytes {
  using Bytes::Bytes;
  using Bytes::next;
  SWEEP_AVX512 __m512i next() {
    _mm_prefetch(reinterpret_cast<const char*>(at) + AHEAD, _MM_HINT_T0);
    return _mm512_loadu_si512(next(nullptr));
  }
};

struct ScatteredAvx512 : Scattered {
  using Scattered::Scattered;
  SWEEP_AVX512 __m512i next() {
    const uint64_t bits = *mask++;
    _mm_prefetch(reinterpret_cast<const char*>(at) + AHEAD, _MM_HINT_T0);
    const __m512i codes = _mm512_maskz_expand_epi8(bits, _mm512_loadu_si512(at));
    at += _mm_popcnt_u64(bits);
    return codes;
  }
  SWEEP_AVX512 const int8_t* next(int8_t* buffer) {
    _mm512_store_si512(buffer, next());
    return buffer;
  }
};

// Sixteen values, rounded as narrow_finite does.
SWEEP_AVX512 inline void store_finite(float* to, __m512 values) { _mm512_storeu_ps(to, values); }
SWEEP_AVX512 inline void store_finite(bf16* to, __m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i even = _mm512_and_si512(_mm512_maskz_srli_epi32(0xffff, bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_maskz_cvtepi32_epi16(0xffff, _mm512_maskz_srli_epi32(0xffff, rounded, 16)));
}

struct Avx512Codes {
  static BytesAvx512 reader(const Codes<8>& m, int64_t row) { return {m, row}; }
  static Halves reader(const Codes<4>& m, int64_t row) { return {m, row}; }
  static ScatteredAvx512 reader(const BitmapCodes& m, int64_t row) { return {m, row}; }

  template <int N, class M>
  SWEEP_AVX512 static void products(const M& m, const float* x, float* out, int64_t begin, int64_t end) {
    const int64_t stride = m.words * WORD;
    constexpr int WAYS = N == 1 ? 4 : N <= 4 ? 2 : 1;
    alignas(64) int8_t buffer[WORD];
    for (int64_t r = begin; r < end; ++r) {
      auto row = reader(m, r);
      RowScales scales(m, r);
      const bool grouped = m.group != 0;
      __m512 sum[N][WAYS], scale = _mm512_setzero_ps();
      for (int n = 0; n < N; ++n)
        for (int i = 0; i < WAYS; ++i) sum[n][i] = _mm512_setzero_ps();
      for (int64_t w = 0; w < m.words; ++w) {
        const int8_t* codes = row.next(buffer);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const int64_t column = w * WORD + 16 * j;
          __m512 weight = _mm512_maskz_cvtepi32_ps(
              0xffff, _mm512_maskz_cvtepi8_epi32(
                          0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * j))));
          if (grouped) {
            if (j % 2 == 0 && column < m.columns) scale = _mm512_set1_ps(scales.next());
            weight = _mm512_mul_ps(weight, scale);
          }
          for (int n = 0; n < N; ++n)
            sum[n][j % WAYS] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(x + n * stride + column), sum[n][j % WAYS]);
        }
      }
      for (int n = 0; n < N; ++n) {
        for (int i = 1; i < WAYS; ++i) sum[n][0] = _mm512_add_ps(sum[n][0], sum[n][i]);
        out[n * m.rows + r] = total(sum[n][0]) * (grouped ? 1.0f : m.scales[r]);
      }
    }
  }

  template <class M, class To>
  SWEEP_AVX512 static void expand(const M& m, To* dense, int64_t begin, int64_t end) {
    alignas(64) int8_t buffer[WORD];
    To last[WORD];
    for (int64_t r = begin; r < end; ++r) {
      auto row = reader(m, r);
      RowScales scales(m, r);
      To* to = dense + (r - begin) * m.columns;
      for (int64_t w = 0; w < m.words; ++w) {
        const int8_t* codes = row.next(buffer);
        const int64_t left = m.columns - w * WORD;
        To* out = left < WORD ? last : to + w * WORD;
        for (int64_t half = 0; half < std::min(left, WORD); half += HALF) {
          const __m512 scale = _mm512_set1_ps(scales.next());
          for (int64_t j = half; j < half + HALF; j += 16) {
            const __m512i wide = _mm512_maskz_cvtepi8_epi32(
                0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + j)));
            store_finite(out + j, _mm512_mul_ps(_mm512_maskz_cvtepi32_ps(0xffff, wide), scale));
          }
        }
        if (left < WORD) std::copy(last, last + left, to + w * WORD);
      }
    }
  }
};

// ---- VNNI: an input as whole numbers of LIMBS bytes, the sums exact ----------------------------------------------------

#define SWEEP_VNNI __attribute__((target(SWEEP_512 ",avx512vnni")))

template <class In>
constexpr int LIMBS = sizeof(In) == sizeof(bf16) ? 3 : 4;

// Before the bytes of an input: what one is worth, and the sum of all its numbers. A word's bytes lie together, the lowest
// of all 64 columns first.
struct Whole {
  double unit;
  int64_t sum;
};
constexpr int64_t WHOLE = 64;  // bytes that it takes, so that what follows is aligned

SWEEP_AVX512 inline __m512i bits16(const float* x, __mmask16 there) { return _mm512_maskz_loadu_epi32(there, x); }
SWEEP_AVX512 inline __m512i bits16(const bf16* x, __mmask16 there) {
  return _mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(there, x)), 16);
}
SWEEP_AVX512 inline int64_t total(__m512i v) {
  alignas(64) int32_t lanes[16];
  _mm512_store_si512(lanes, v);
  int64_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += lanes[i];
  return sum;
}

struct Vnni {
  template <class In>
  SWEEP_VNNI static void prepare(const In* x, int64_t columns, int64_t words, char* to) {
    const auto there = [&](int64_t c) {
      return static_cast<__mmask16>(c + 16 <= columns ? 0xffff : c < columns ? (1u << (columns - c)) - 1 : 0);
    };
    alignas(64) uint32_t lanes[16];
    __m512i most = _mm512_setzero_si512();
    for (int64_t c = 0; c < columns; c += 16)
      most = _mm512_maskz_max_epu32(0xffff, most,
                                    _mm512_and_si512(bits16(x + c, there(c)), _mm512_set1_epi32(0x7fffffff)));
    _mm512_store_si512(lanes, most);
    const uint32_t bits = *std::max_element(lanes, lanes + 16);
    float largest;
    std::memcpy(&largest, &bits, sizeof(largest));
    const bool finite = bits < 0x7f800000u;
    constexpr float MOST = LIMBS<In> == 3 ? 0x7f0000p0f : 0x7f000000p0f;  // short of the largest: products are rounded
    const float times = finite && largest > 1e-28f ? MOST / largest : 0.0f;  // what is smaller counts as 0
    int64_t sum = 0;
    for (int64_t w = 0; w < words; ++w)
      for (int64_t j = 0; j < WORD; j += 16) {
        const int64_t c = w * WORD + j;
        const __m512 value = _mm512_castsi512_ps(bits16(x + std::min(c, columns), there(c)));
        __m512i number = _mm512_maskz_cvtps_epi32(finite ? 0xffff : 0, _mm512_mul_ps(value, _mm512_set1_ps(times)));
        sum += total(number);
        for (int limb = 0; limb < LIMBS<In>; ++limb) {
          _mm_store_si128(reinterpret_cast<__m128i*>(to + WHOLE + (w * LIMBS<In> + limb) * WORD + j),
                          _mm512_maskz_cvtepi32_epi8(0xffff, number));
          number = _mm512_maskz_srai_epi32(0xffff, _mm512_add_epi32(number, _mm512_set1_epi32(128)), 8);
        }
      }
    const Whole whole{finite ? (times ? 1.0 / static_cast<double>(times) : 0.0)
                             : std::numeric_limits<double>::quiet_NaN(), sum};
    std::memcpy(to, &whole, sizeof(whole));
  }

  // R rows at a time, which share the loads of the inputs. The instruction takes one side without a sign: the codes plus
  // 128, for which 128 times the sum of the input is taken off.
  template <class In, int N, int R, class M>
  SWEEP_VNNI static void rows(const M& m, const char* x, float* out, int64_t r) {
    constexpr int L = LIMBS<In>;
    const int64_t each = WHOLE + m.words * WORD * L;
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    decltype(Avx512Codes::reader(m, r)) row[2] = {Avx512Codes::reader(m, r), Avx512Codes::reader(m, r + R - 1)};
    __m512i sum[R][N][L];
    for (int i = 0; i < R; ++i)
      for (int n = 0; n < N; ++n)
        for (int limb = 0; limb < L; ++limb) sum[i][n][limb] = _mm512_setzero_si512();
    for (int64_t w = 0; w < m.words; ++w) {
      __m512i codes[R];
      for (int i = 0; i < R; ++i) codes[i] = _mm512_xor_si512(row[i].next(), sign);
      for (int n = 0; n < N; ++n)
        for (int limb = 0; limb < L; ++limb) {
          const __m512i input = _mm512_loadu_si512(x + n * each + WHOLE + (w * L + limb) * WORD);
          for (int i = 0; i < R; ++i) sum[i][n][limb] = _mm512_dpbusd_epi32(sum[i][n][limb], codes[i], input);
        }
    }
    for (int i = 0; i < R; ++i)
      for (int n = 0; n < N; ++n) {
        Whole whole;
        std::memcpy(&whole, x + n * each, sizeof(whole));
        double number = -128.0 * static_cast<double>(whole.sum), worth = 1;
        for (int limb = 0; limb < L; ++limb, worth *= 256) number += worth * static_cast<double>(total(sum[i][n][limb]));
        out[n * m.rows + r + i] = static_cast<float>(number * whole.unit * static_cast<double>(m.scales[r + i]));
      }
  }

  template <class In, int N, class M>
  SWEEP_VNNI static void products(const M& m, const char* x, float* out, int64_t begin, int64_t end) {
    constexpr int L = LIMBS<In>, FIRST = N * L <= 24 ? N : 4, REST = N - FIRST;  // registers
    constexpr int R = N <= 2 ? 2 : 1;
    for (int64_t r = begin; r < end; r += R) {
      if constexpr (R == 2)
        if (r + 1 == end) return rows<In, N, 1>(m, x, out, r);
      rows<In, FIRST, R>(m, x, out, r);
      if constexpr (REST > 0)
        rows<In, REST, 1>(m, x + FIRST * (WHOLE + m.words * WORD * L), out + FIRST * m.rows, r);
    }
  }
};

#endif  // SWEEP_X86

// ---- Choice at run time ------------------------------------------------------------------------------------------------

// Whether the kernel multiplies bytes: those of a row have one scale.
template <class M>
bool by_bytes(Version version, const M& m) {
  if constexpr (std::is_same_v<M, Codes<4>>) return false;
  return version == Version::avx512_vnni && m.group == 0;
}

// Of one prepared input, and the input as the kernel reads it, as in bitmap.h.
template <class In, class M, class = if_codes<M>>
int64_t prepared_bytes(Version version, const M& m) {
#ifdef SWEEP_X86
  if (by_bytes(version, m)) return WHOLE + m.words * WORD * LIMBS<In>;
#endif
  return m.words * WORD * static_cast<int64_t>(sizeof(float));
}
template <class In, class M, class = if_codes<M>>
void prepare(Version version, const M& m, const In* x, void* to) {
#ifdef SWEEP_X86
  if (by_bytes(version, m)) return Vnni::prepare(x, m.columns, m.words, static_cast<char*>(to));
#endif
  widen_all(x, m.columns, m.words * WORD, static_cast<float*>(to));
}

template <class In, int N, class M, class = if_codes<M>>
void products_of(Version version, const M& m, const void* x, float* out, int64_t begin, int64_t end) {
  const float* input = static_cast<const float*>(x);
#ifdef SWEEP_X86
  if constexpr (!std::is_same_v<M, Codes<4>>)
    if (by_bytes(version, m)) return Vnni::products<In, N>(m, static_cast<const char*>(x), out, begin, end);
  if (version >= Version::avx512) return Avx512Codes::products<N>(m, input, out, begin, end);
  if (version == Version::avx2) return Avx2Codes::products<N>(m, input, out, begin, end);
#endif
  PortableCodes::products<N>(m, input, out, begin, end);
}

template <class M, class To, class = if_codes<M>>
void expand(Version version, const M& m, To* dense, int64_t begin, int64_t end) {
#ifdef SWEEP_X86
  if (version >= Version::avx512) return Avx512Codes::expand(m, dense, begin, end);
  if (version == Version::avx2) return Avx2Codes::expand(m, dense, begin, end);
#endif
  PortableCodes::expand(m, dense, begin, end);
}

}  // namespace sweep

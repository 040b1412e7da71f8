// Runs every version of the kernels that this processor has, on matrices of many shapes held in memory of exactly their
// size, so that a sanitizer sees every access outside. Exits 1 when two versions disagree.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "bitmap.h"
#include "codes.h"

namespace {

template <class T>
struct Held {
  std::vector<uint64_t> mask;
  std::vector<int32_t> offsets{0};
  std::vector<T> values;
  sweep::Matrix<T> matrix;

  Held(int64_t rows, int64_t columns, double sparsity, std::mt19937& draw) {
    const int64_t words = (columns + sweep::WORD - 1) / sweep::WORD;
    mask.assign(static_cast<size_t>(rows * words), 0);
    std::uniform_real_distribution<double> uniform(0, 1);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c)
        if (uniform(draw) >= sparsity) {
          mask[static_cast<size_t>(r * words + c / 64)] |= uint64_t{1} << (c % 64);
          T value;
          sweep::narrow(static_cast<float>(uniform(draw) - 0.5), &value);
          values.push_back(value);
        }
      offsets.push_back(static_cast<int32_t>(values.size()));
    }
    values.resize(values.size() + sweep::PADDING / sizeof(T));
    values.shrink_to_fit();
    matrix = {rows, columns, words, mask.data(), offsets.data(), values.data()};
  }
};

template <class T>
long compare(sweep::Version version, double tolerance) {
  std::mt19937 draw(1);
  long cases = 0;
  for (int64_t columns : {1, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 129, 200, 576})
    for (int64_t rows : {1, 2, 5})
      for (double sparsity : {0.0, 0.5, 0.9, 1.0}) {
        const Held<T> held(rows, columns, sparsity, draw);
        std::vector<T> dense(static_cast<size_t>(rows * columns)), expected(dense.size());
        sweep::expand(version, held.matrix, dense.data(), 0, rows);
        sweep::expand(sweep::Version::portable, held.matrix, expected.data(), 0, rows);
        if (dense != expected) return -1;
        std::vector<float> wide(dense.size());
        sweep::expand(version, held.matrix, wide.data(), 0, rows);
        for (size_t i = 0; i < wide.size(); ++i)
          if (wide[i] != sweep::widen(expected[i])) return -1;
        for (int tokens = 1; tokens <= sweep::MAX_TOKENS; ++tokens) {
          const int64_t each = sweep::prepared_bytes<T>(version, held.matrix);
          std::vector<T> x(static_cast<size_t>(columns));
          std::vector<char> prepared(static_cast<size_t>(tokens * each));
          std::vector<double> sums(static_cast<size_t>(tokens * rows));
          for (int n = 0; n < tokens; ++n) {
            for (auto& value : x) sweep::narrow(static_cast<float>(draw() % 1000) / 1000.0f, &value);
            sweep::prepare<T>(version, held.matrix, x.data(), prepared.data() + n * each);
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t c = 0; c < columns; ++c)
                sums[static_cast<size_t>(n * rows + r)] +=
                    static_cast<double>(sweep::widen(expected[static_cast<size_t>(r * columns + c)])) *
                    static_cast<double>(sweep::widen(x[static_cast<size_t>(c)]));
          }
          std::vector<float> out(sums.size());
          sweep::products<T>(version, tokens, held.matrix, prepared.data(), out.data(), 0, rows);
          for (size_t i = 0; i < out.size(); ++i)
            if (!(std::fabs(static_cast<double>(out[i]) - sums[i]) <= tolerance * static_cast<double>(columns))) return -1;
          ++cases;
        }
      }
  return cases;
}

// A matrix of codes, bits each, or of those that are not 0 where `bitmap`.
struct HeldCodes {
  std::vector<int8_t> whole, bytes, packed;
  std::vector<uint8_t> halves;
  std::vector<uint64_t> mask;
  std::vector<int32_t> offsets{0};
  std::vector<float> scales;
  int64_t rows, columns, words, group;

  HeldCodes(int64_t rows, int64_t columns, int64_t group, int bits, double sparsity, std::mt19937& draw)
      : rows(rows), columns(columns), words((columns + sweep::WORD - 1) / sweep::WORD), group(group) {
    const int most = (1 << (bits - 1)) - 1;
    std::uniform_real_distribution<double> uniform(0, 1);
    bytes.assign(static_cast<size_t>(rows * words * 64), 0);
    halves.assign(bytes.size() / 2, 0x88);
    mask.assign(static_cast<size_t>(rows * words), 0);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        const int code = uniform(draw) < sparsity ? 0 : static_cast<int>(draw() % (2 * most + 1)) - most;
        whole.push_back(static_cast<int8_t>(code));
        bytes[static_cast<size_t>(r * words * 64 + c)] = static_cast<int8_t>(code);
        if (code) {
          mask[static_cast<size_t>(r * words + c / 64)] |= uint64_t{1} << (c % 64);
          packed.push_back(static_cast<int8_t>(code));
        }
        uint8_t& byte = halves[static_cast<size_t>(r * words * 32 + c / 64 * 32 + c % 32)];
        const uint8_t half = static_cast<uint8_t>((code + 8) & 15);
        byte = c % 64 < 32 ? static_cast<uint8_t>((byte & 0xf0) | half) : static_cast<uint8_t>((byte & 15) | half << 4);
      }
      offsets.push_back(static_cast<int32_t>(packed.size()));
      for (int64_t g = 0; g < (group ? columns / group : 1); ++g) scales.push_back(static_cast<float>(uniform(draw)));
    }
    packed.resize(packed.size() + sweep::PADDING);
    packed.shrink_to_fit();
  }
  sweep::Scales scale() const { return {sweep::Scales::FLOAT, scales.data()}; }
  double value(int64_t r, int64_t c) const {
    return static_cast<double>(whole[static_cast<size_t>(r * columns + c)]) *
           static_cast<double>(scales[static_cast<size_t>(group ? r * (columns / group) + c / group : r)]);
  }
};

template <class T, class M>
bool agrees(sweep::Version version, const HeldCodes& held, const M& m, std::mt19937& draw) {
  std::vector<float> dense(static_cast<size_t>(m.rows * m.columns));
  sweep::expand(version, m, dense.data(), 0, m.rows);
  for (int64_t r = 0; r < m.rows; ++r)
    for (int64_t c = 0; c < m.columns; ++c)
      if (dense[static_cast<size_t>(r * m.columns + c)] != static_cast<float>(held.value(r, c))) return false;
  for (int tokens = 1; tokens <= sweep::MAX_TOKENS; ++tokens) {
    const int64_t each = sweep::prepared_bytes<T>(version, m);
    void* place = std::aligned_alloc(64, static_cast<size_t>((tokens * each + 63) / 64 * 64));
    std::vector<double> sums(static_cast<size_t>(tokens * m.rows)), sizes(sums.size());
    for (int n = 0; n < tokens; ++n) {
      std::vector<T> x(static_cast<size_t>(m.columns));
      for (auto& value : x) sweep::narrow(static_cast<float>(draw() % 2000) / 1000.0f - 1.0f, &value);
      sweep::prepare<T>(version, m, x.data(), static_cast<char*>(place) + n * each);
      for (int64_t r = 0; r < m.rows; ++r)
        for (int64_t c = 0; c < m.columns; ++c) {
          const double product = held.value(r, c) * static_cast<double>(sweep::widen(x[static_cast<size_t>(c)]));
          sums[static_cast<size_t>(n * m.rows + r)] += product;
          sizes[static_cast<size_t>(n * m.rows + r)] += std::fabs(product);
        }
    }
    std::vector<float> out(sums.size());
    sweep::products<T>(version, tokens, m, place, out.data(), 0, m.rows);
    std::free(place);
    for (size_t i = 0; i < out.size(); ++i)
      if (!(std::fabs(static_cast<double>(out[i]) - sums[i]) <= 1e-6 * sizes[i] + 1e-30)) return false;
  }
  return true;
}

template <class T>
bool codes_agree(sweep::Version version) {
  std::mt19937 draw(2);
  for (int64_t columns : {1, 31, 32, 64, 65, 96, 200, 576})
    for (int64_t rows : {1, 2, 5})
      for (int64_t group : {0, 32, 96})
        for (double sparsity : {0.0, 0.6, 1.0}) {
          if (group && columns % group) continue;
          const HeldCodes eight(rows, columns, group, 8, sparsity, draw), four(rows, columns, group, 4, sparsity, draw);
          const int64_t words = eight.words;
          if (!agrees<T>(version, eight, sweep::Codes<8>{rows, columns, words, group, eight.bytes.data(), eight.scale()}, draw) ||
              !agrees<T>(version, four, sweep::Codes<4>{rows, columns, words, group, four.halves.data(), four.scale()}, draw) ||
              !agrees<T>(version, eight,
                         sweep::BitmapCodes{rows, columns, words, group, eight.mask.data(), eight.offsets.data(),
                                            eight.packed.data(), eight.scale()},
                         draw))
            return false;
        }
  return true;
}

}  // namespace

int main() {
  for (size_t i = 0; i < sweep::VERSION_NAMES.size(); ++i) {
    const auto version = static_cast<sweep::Version>(i);
    if (!sweep::available(version)) continue;
    const long narrow = compare<sweep::bf16>(version, 1e-6), wide = compare<float>(version, 1e-6);
    if (narrow < 0 || wide < 0 || !codes_agree<sweep::bf16>(version) || !codes_agree<float>(version)) {
      std::printf("%s disagrees\n", sweep::VERSION_NAMES[i]);
      return 1;
    }
    std::printf("%s: %ld cases\n", sweep::VERSION_NAMES[i], narrow + wide);
  }
  return 0;
}

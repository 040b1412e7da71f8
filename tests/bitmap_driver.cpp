// Runs every version of the kernels that this processor has, on matrices of many shapes held in memory of exactly their
// size, so that a sanitizer sees every access outside. Exits 1 when two versions disagree.

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "bitmap.h"

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
          const int64_t each = sweep::prepared_bytes(version, held.matrix);
          std::vector<T> x(static_cast<size_t>(columns));
          std::vector<char> prepared(static_cast<size_t>(tokens * each));
          std::vector<double> sums(static_cast<size_t>(tokens * rows));
          for (int n = 0; n < tokens; ++n) {
            for (auto& value : x) sweep::narrow(static_cast<float>(draw() % 1000) / 1000.0f, &value);
            sweep::prepare(version, held.matrix, x.data(), prepared.data() + n * each);
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t c = 0; c < columns; ++c)
                sums[static_cast<size_t>(n * rows + r)] +=
                    static_cast<double>(sweep::widen(expected[static_cast<size_t>(r * columns + c)])) *
                    static_cast<double>(sweep::widen(x[static_cast<size_t>(c)]));
          }
          std::vector<float> out(sums.size());
          sweep::products(version, tokens, held.matrix, prepared.data(), out.data(), 0, rows);
          for (size_t i = 0; i < out.size(); ++i)
            if (!(std::fabs(static_cast<double>(out[i]) - sums[i]) <= tolerance * static_cast<double>(columns))) return -1;
          ++cases;
        }
      }
  return cases;
}

}  // namespace

int main() {
  for (size_t i = 0; i < sweep::VERSION_NAMES.size(); ++i) {
    const auto version = static_cast<sweep::Version>(i);
    if (!sweep::available(version)) continue;
    const long narrow = compare<sweep::bf16>(version, 1e-6), wide = compare<float>(version, 1e-6);
    if (narrow < 0 || wide < 0) {
      std::printf("%s disagrees\n", sweep::VERSION_NAMES[i]);
      return 1;
    }
    std::printf("%s: %ld cases\n", sweep::VERSION_NAMES[i], narrow + wide);
  }
  return 0;
}

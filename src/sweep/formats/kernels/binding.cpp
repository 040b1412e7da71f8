// The kernels of bitmap.h and codes.h behind tensors: one call a linear layer, threads of PyTorch's own pool.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "bitmap.h"
#include "codes.h"

namespace {

using at::Tensor;
using sweep::Version;

constexpr int64_t TILE = 128;  // rows that a dense product works on at a time: a panel of so many, or of a multiple
constexpr int64_t SERIAL = 1 << 14;  // bytes of a matrix below which a second thread costs more than it brings

template <class T>
sweep::Matrix<T> view(const Tensor& mask, const Tensor& values, const Tensor& offsets, int64_t columns) {
  const int64_t rows = offsets.numel() - 1;
  TORCH_CHECK(mask.scalar_type() == at::kLong && offsets.scalar_type() == at::kInt && mask.is_contiguous() &&
                  values.is_contiguous() && offsets.is_contiguous() && rows >= 0 && mask.dim() == 2 &&
                  mask.size(0) == rows && mask.size(1) == (columns + sweep::WORD - 1) / sweep::WORD,
              "bitmap: mask must be (rows, words) int64 and offsets (rows + 1) int32");
  return {rows,
          columns,
          mask.size(1),
          reinterpret_cast<const uint64_t*>(mask.const_data_ptr<int64_t>()),
          offsets.const_data_ptr<int32_t>(),
          static_cast<const T*>(values.const_data_ptr())};
}

// work(begin, end) over all rows, in parts of equal bytes, one a thread.
template <class M, class Work>
void over_rows(const M& m, int64_t begin, int64_t end, const Work& work) {
  const int64_t bytes = bytes_before(m, end) - bytes_before(m, begin);
  const int64_t parts = bytes < SERIAL || at::in_parallel_region() ? 1 : at::get_num_threads();
  if (parts == 1) return work(begin, end);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    const int64_t from = sweep::first_row(m, first, parts, begin, end);
    const int64_t to = sweep::first_row(m, last, parts, begin, end);
    if (from < to) work(from, to);
  });
}

// Few inputs of type T: each pass over the compressed matrix serves up to MAX_TOKENS of them.
template <class T, class M>
Tensor by_products(Version version, const M& m, const Tensor& x, const Tensor& bias) {
  const int64_t tokens = x.numel() / m.columns, each = sweep::prepared_bytes<T>(version, m);
  const Tensor input = x.contiguous();
  const Tensor prepared = at::empty({tokens * each}, at::kByte);  // which is aligned: no load crosses a cache line
  char* const place = static_cast<char*>(prepared.mutable_data_ptr());
  for (int64_t n = 0; n < tokens; ++n)
    sweep::prepare<T>(version, m, static_cast<const T*>(input.const_data_ptr()) + n * m.columns, place + n * each);
  Tensor out = at::empty({tokens, m.rows}, x.options());
  T* result = static_cast<T*>(out.mutable_data_ptr());
  const T* add = bias.defined() ? static_cast<const T*>(bias.const_data_ptr()) : nullptr;
  std::vector<float> sums(static_cast<size_t>(std::min<int64_t>(tokens, sweep::MAX_TOKENS) * m.rows));
  for (int64_t done = 0; done < tokens; done += sweep::MAX_TOKENS) {
    const int now = static_cast<int>(std::min<int64_t>(tokens - done, sweep::MAX_TOKENS));
    const char* from = place + done * each;
    over_rows(m, 0, m.rows, [&](int64_t begin, int64_t end) {
      sweep::products<T>(version, now, m, from, sums.data(), begin, end);
      for (int n = 0; n < now; ++n)
        for (int64_t r = begin; r < end; ++r)
          sweep::narrow(sums[n * m.rows + r] + (add ? sweep::widen(add[r]) : 0.0f), result + (done + n) * m.rows + r);
    });
  }
  return out;
}

// Scratch memory for one panel, kept: fresh pages would cost as much as the expansion.
char* scratch(int64_t bytes) {
  thread_local std::unique_ptr<char[]> memory;
  thread_local int64_t held = 0;
  if (held < bytes) {
    memory.reset();
    memory.reset(new char[static_cast<size_t>(bytes)]);
    held = bytes;
  }
  return memory.get();
}

// Many inputs: a panel of rows at a time is expanded, as elements of type To, and multiplied by PyTorch's dense product.
template <class T, class To, class M>
Tensor by_panels(Version version, const M& m, const Tensor& x, const Tensor& bias, int64_t panel_bytes) {
  const auto type = std::is_same_v<T, To> ? x.scalar_type() : at::kFloat;
  const Tensor input = x.reshape({-1, m.columns}).to(type);
  const Tensor added = bias.defined() ? bias.to(type) : bias;
  const int64_t row_bytes = m.columns * static_cast<int64_t>(sizeof(To));
  const int64_t panels = std::max<int64_t>((m.rows * row_bytes + panel_bytes - 1) / panel_bytes, 1);
  const int64_t tiles = (m.rows + panels * TILE - 1) / (panels * TILE);
  const int64_t panel = std::clamp<int64_t>(tiles * TILE, 1, std::max<int64_t>(m.rows, 1));
  To* dense = reinterpret_cast<To*>(scratch(panel * row_bytes));
  Tensor out;
  if (panel < m.rows) out = at::empty({input.size(0), m.rows}, x.options());
  for (int64_t begin = 0; begin < m.rows; begin += panel) {
    const int64_t end = std::min(begin + panel, m.rows);
    over_rows(m, begin, end, [&](int64_t from, int64_t to) {
      sweep::expand(version, m, dense + (from - begin) * m.columns, from, to);
    });
    const Tensor weight = at::from_blob(dense, {end - begin, m.columns}, input.options());
    const Tensor part = at::linear(input, weight, added.defined() ? added.narrow(0, begin, end - begin) : added);
    if (!out.defined()) return part.to(x.scalar_type());
    out.narrow(1, begin, end - begin).copy_(part);
  }
  return out.defined() ? out : at::empty({input.size(0), 0}, x.options());
}

// Where the processor has no instructions for bfloat16, its dense product takes many times as long as float32's.
template <class T>
bool widened() {
  return sizeof(T) == sizeof(sweep::bf16) && !sweep::available(Version::avx512_bf16);
}

template <class T, class M>
Tensor dispatch(Version version, const M& m, const Tensor& x, const std::optional<Tensor>& bias, int64_t few,
                int64_t panel_bytes) {
  TORCH_CHECK(x.dim() >= 1 && m.columns > 0 && x.size(-1) == m.columns, "the input has ", x.size(-1),
              " features, the matrix ", m.columns);
  TORCH_CHECK(!bias || (bias->numel() == m.rows && bias->scalar_type() == x.scalar_type()),
              "the bias must be (rows) of the input's dtype");
  const Tensor added = bias.value_or(Tensor());
  const int64_t tokens = x.numel() / m.columns;
  auto shape = x.sizes().vec();
  shape.back() = m.rows;
  const Tensor out = tokens <= few  ? by_products<T>(version, m, x, added)
                     : widened<T>() ? by_panels<T, float>(version, m, x, added, panel_bytes)
                                    : by_panels<T, T>(version, m, x, added, panel_bytes);
  return out.view(shape);
}

template <class M, class To>
Tensor expand_all(Version version, const M& m, at::ScalarType dtype, To) {
  Tensor dense = at::empty({m.rows, m.columns}, at::device(at::kCPU).dtype(dtype));
  To* to = static_cast<To*>(dense.mutable_data_ptr());
  over_rows(m, 0, m.rows, [&](int64_t from, int64_t until) {
    sweep::expand(version, m, to + from * m.columns, from, until);
  });
  return dense;
}

// work(element), with an element of the dtype's type.
template <class Work>
Tensor of_type(at::ScalarType dtype, const Work& work) {
  if (dtype == at::kBFloat16) return work(sweep::bf16{});
  TORCH_CHECK(dtype == at::kFloat, "bfloat16 and float32 only, got ", dtype);
  return work(float{});
}

Version checked(int64_t version) {
  TORCH_CHECK(version >= 0 && version < static_cast<int64_t>(sweep::VERSION_NAMES.size()) &&
                  sweep::available(static_cast<Version>(version)),
              "this processor cannot run kernel version ", version);
  return static_cast<Version>(version);
}

Tensor bitmap_linear(const Tensor& x, const Tensor& mask, const Tensor& values, const Tensor& offsets,
                     const std::optional<Tensor>& bias, int64_t columns, int64_t version, int64_t few,
                     int64_t panel_bytes) {
  const c10::AutoGradMode guard(false);
  TORCH_CHECK(x.scalar_type() == values.scalar_type() && x.device().is_cpu(), "the input is ", x.scalar_type(), " on ",
              x.device(), ", the matrix ", values.scalar_type(), " on cpu");
  return of_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    return dispatch<T>(checked(version), view<T>(mask, values, offsets, columns), x, bias, few, panel_bytes);
  });
}

Tensor bitmap_expand(const Tensor& mask, const Tensor& values, const Tensor& offsets, int64_t columns,
                     int64_t version) {
  return of_type(values.scalar_type(), [&](auto element) {
    const auto m = view<decltype(element)>(mask, values, offsets, columns);
    return expand_all(checked(version), m, values.scalar_type(), element);
  });
}

// A matrix of codes: those of a bitmap where there is a mask, else dense ones, int8 or two in a uint8.
struct CodesTensors {
  const Tensor& codes;
  const Tensor& scales;
  const std::optional<Tensor>& mask;
  const std::optional<Tensor>& offsets;
  int64_t columns;
};

template <class Work>
Tensor with_codes(const CodesTensors& t, const Work& work) {
  const int64_t rows = t.scales.size(0), words = (t.columns + sweep::WORD - 1) / sweep::WORD;
  const auto type = t.scales.scalar_type();
  TORCH_CHECK(t.scales.dim() == 2 && (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf) &&
                  t.scales.is_contiguous() && t.codes.is_contiguous() && t.columns > 0,
              "codes: scales must be (rows, groups) float32, bfloat16 or float16");
  using sweep::Scales;
  const Scales scales{type == at::kFloat ? Scales::FLOAT : type == at::kBFloat16 ? Scales::BF16 : Scales::HALF_FLOAT,
                      t.scales.const_data_ptr()};
  const int64_t groups = t.scales.size(1), group = groups == 1 ? 0 : t.columns / groups;
  TORCH_CHECK(group * groups == (group ? t.columns : 0) && group % sweep::HALF == 0,
              "codes: a group is a multiple of 32 columns that divides them");
  if (t.mask) {
    TORCH_CHECK(t.offsets && t.codes.scalar_type() == at::kChar, "codes: a bitmap has int8 codes and offsets");
    const auto m = view<int8_t>(*t.mask, t.codes, *t.offsets, t.columns);
    TORCH_CHECK(m.rows == rows, "codes: as many scales as rows");
    return work(sweep::BitmapCodes{rows, t.columns, words, group, m.mask, m.offsets, m.values, scales});
  }
  const bool whole = t.codes.scalar_type() == at::kChar;
  TORCH_CHECK((whole || t.codes.scalar_type() == at::kByte) && t.codes.dim() == 2 && t.codes.size(0) == rows &&
                  t.codes.size(1) == words * (whole ? sweep::WORD : sweep::HALF),
              "codes: dense ones must be (rows, 64 words) int8 or (rows, 32 words) uint8");
  if (whole)
    return work(sweep::Codes<8>{rows, t.columns, words, group, t.codes.const_data_ptr<int8_t>(), scales});
  return work(sweep::Codes<4>{rows, t.columns, words, group, t.codes.const_data_ptr<uint8_t>(), scales});
}

Tensor codes_linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& mask,
                    const std::optional<Tensor>& offsets, const std::optional<Tensor>& bias, int64_t columns,
                    int64_t version, int64_t few, int64_t panel_bytes) {
  const c10::AutoGradMode guard(false);
  TORCH_CHECK(x.device().is_cpu(), "the input is on ", x.device(), ", the matrix on cpu");
  return of_type(x.scalar_type(), [&](auto element) {
    return with_codes({codes, scales, mask, offsets, columns}, [&](const auto& m) {
      return dispatch<decltype(element)>(checked(version), m, x, bias, few, panel_bytes);
    });
  });
}

Tensor codes_expand(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& mask,
                    const std::optional<Tensor>& offsets, int64_t columns, at::ScalarType dtype, int64_t version) {
  return of_type(dtype, [&](auto element) {
    return with_codes({codes, scales, mask, offsets, columns},
                      [&](const auto& m) { return expand_all(checked(version), m, dtype, element); });
  });
}

// Names of the kernel versions that this processor can run, slowest first; the place in VERSION_NAMES is the number.
std::vector<std::string> versions() {
  std::vector<std::string> names;
  for (size_t i = 0; i < sweep::VERSION_NAMES.size(); ++i)
    if (sweep::available(static_cast<Version>(i))) names.emplace_back(sweep::VERSION_NAMES[i]);
  return names;
}

// How many threads a loop over rows truly runs on.
int64_t threads() {
  std::mutex guard;
  std::set<std::thread::id> seen;
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const std::lock_guard<std::mutex> lock(guard);
    seen.insert(std::this_thread::get_id());
  });
  return static_cast<int64_t>(seen.size());
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("bitmap_linear", &bitmap_linear, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("bitmap_expand", &bitmap_expand, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("codes_linear", &codes_linear, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("codes_expand", &codes_expand, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("versions", &versions);
  module.def("threads", &threads, pybind11::call_guard<pybind11::gil_scoped_release>());
}

// The kernels of bitmap.h behind tensors: one call a linear layer, threads of PyTorch's own pool.

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
template <class T, class Work>
void over_rows(const sweep::Matrix<T>& m, int64_t begin, int64_t end, const Work& work) {
  const int64_t bytes =
      static_cast<int64_t>(sizeof(T)) * (m.offsets[end] - m.offsets[begin]) + (end - begin) * m.words * 8;
  const int64_t parts = bytes < SERIAL || at::in_parallel_region() ? 1 : at::get_num_threads();
  if (parts == 1) return work(begin, end);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    const int64_t from = sweep::first_row(m, first, parts, begin, end);
    const int64_t to = sweep::first_row(m, last, parts, begin, end);
    if (from < to) work(from, to);
  });
}

// Few inputs: each pass over the compressed matrix serves up to MAX_TOKENS of them.
template <class T>
Tensor by_products(Version version, const sweep::Matrix<T>& m, const Tensor& x, const Tensor& bias) {
  const int64_t tokens = x.numel() / m.columns, each = sweep::prepared_bytes(version, m);
  const Tensor input = x.contiguous();
  const Tensor prepared = at::empty({tokens * each}, at::kByte);  // which is aligned: no load crosses a cache line
  char* const place = static_cast<char*>(prepared.mutable_data_ptr());
  for (int64_t n = 0; n < tokens; ++n)
    sweep::prepare(version, m, static_cast<const T*>(input.const_data_ptr()) + n * m.columns, place + n * each);
  Tensor out = at::empty({tokens, m.rows}, x.options());
  T* result = static_cast<T*>(out.mutable_data_ptr());
  const T* add = bias.defined() ? static_cast<const T*>(bias.const_data_ptr()) : nullptr;
  std::vector<float> sums(static_cast<size_t>(std::min<int64_t>(tokens, sweep::MAX_TOKENS) * m.rows));
  for (int64_t done = 0; done < tokens; done += sweep::MAX_TOKENS) {
    const int now = static_cast<int>(std::min<int64_t>(tokens - done, sweep::MAX_TOKENS));
    const char* from = place + done * each;
    over_rows(m, 0, m.rows, [&](int64_t begin, int64_t end) {
      sweep::products(version, now, m, from, sums.data(), begin, end);
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
template <class T, class To>
Tensor by_panels(Version version, const sweep::Matrix<T>& m, const Tensor& x, const Tensor& bias, int64_t panel_bytes) {
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

template <class T>
Tensor dispatch(Version version, const Tensor& x, const Tensor& mask, const Tensor& values, const Tensor& offsets,
                const Tensor& bias, int64_t columns, int64_t few, int64_t panel_bytes) {
  const auto m = view<T>(mask, values, offsets, columns);
  TORCH_CHECK(!bias.defined() || (bias.numel() == m.rows && bias.scalar_type() == x.scalar_type()),
              "bitmap: the bias must be (rows) of the input's dtype");
  const int64_t tokens = x.numel() / columns;
  auto shape = x.sizes().vec();
  shape.back() = m.rows;
  const Tensor out = tokens <= few  ? by_products(version, m, x, bias)
                     : widened<T>() ? by_panels<T, float>(version, m, x, bias, panel_bytes)
                                    : by_panels<T, T>(version, m, x, bias, panel_bytes);
  return out.view(shape);
}

Version checked(int64_t version) {
  TORCH_CHECK(version >= 0 && version < static_cast<int64_t>(sweep::VERSION_NAMES.size()) &&
                  sweep::available(static_cast<Version>(version)),
              "bitmap: this processor cannot run kernel version ", version);
  return static_cast<Version>(version);
}

Tensor linear(const Tensor& x, const Tensor& mask, const Tensor& values, const Tensor& offsets,
              const std::optional<Tensor>& bias, int64_t columns, int64_t version, int64_t few, int64_t panel_bytes) {
  const c10::AutoGradMode guard(false);
  const Version kernel = checked(version);
  TORCH_CHECK(x.dim() >= 1 && columns > 0 && x.size(-1) == columns, "bitmap: the input has ", x.size(-1),
              " features, the matrix ", columns);
  TORCH_CHECK(x.scalar_type() == values.scalar_type() && x.device().is_cpu(), "bitmap: the input is ", x.scalar_type(),
              " on ", x.device(), ", the matrix ", values.scalar_type(), " on cpu");
  const Tensor added = bias.value_or(Tensor());
  if (x.scalar_type() == at::kBFloat16)
    return dispatch<sweep::bf16>(kernel, x, mask, values, offsets, added, columns, few, panel_bytes);
  TORCH_CHECK(x.scalar_type() == at::kFloat, "bitmap: bfloat16 and float32 only, got ", x.scalar_type());
  return dispatch<float>(kernel, x, mask, values, offsets, added, columns, few, panel_bytes);
}

template <class T>
void expand_all(Version version, const sweep::Matrix<T>& m, Tensor& dense) {
  T* to = static_cast<T*>(dense.mutable_data_ptr());
  over_rows(m, 0, m.rows, [&](int64_t from, int64_t until) {
    sweep::expand(version, m, to + from * m.columns, from, until);
  });
}

Tensor expand(const Tensor& mask, const Tensor& values, const Tensor& offsets, int64_t columns, int64_t version) {
  const Version kernel = checked(version);
  Tensor dense = at::empty({offsets.numel() - 1, columns}, values.options());
  if (values.scalar_type() == at::kBFloat16) {
    expand_all(kernel, view<sweep::bf16>(mask, values, offsets, columns), dense);
  } else {
    TORCH_CHECK(values.scalar_type() == at::kFloat, "bitmap: bfloat16 and float32 only, got ", values.scalar_type());
    expand_all(kernel, view<float>(mask, values, offsets, columns), dense);
  }
  return dense;
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
  module.def("linear", &linear, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("expand", &expand, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("versions", &versions);
  module.def("threads", &threads, pybind11::call_guard<pybind11::gil_scoped_release>());
}

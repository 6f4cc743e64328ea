// The C++ API used as an embedding runtime would, at one instruction-set level: test_core LEVEL.
// The thorough numerical tests are in Python; these see what Python cannot: workspaces, strides,
// exceptions, sanitizers without an interpreter.

#include <lowbitcore/lowbitcore.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace lbc = lowbitcore;

namespace {

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (!holds) {
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    ++failures;
  }
}

// Runs f and expects std::invalid_argument whose message contains every part.
void expect_error(const std::function<void()>& f, const std::vector<std::string>& parts) {
  try {
    f();
  } catch (const std::invalid_argument& error) {
    for (const auto& part : parts) {
      expect(std::string(error.what()).find(part) != std::string::npos,
             "message '" + std::string(error.what()) + "' names '" + part + "'");
    }
    return;
  }
  expect(false, "an error that names " + parts.front());
}

template <typename T>
lbc::View<T> view(std::vector<T>& data, std::int64_t rows, std::int64_t cols) {
  return {data.data(), rows, cols, cols};
}

template <typename T>
lbc::View<const T> view(const std::vector<T>& data, std::int64_t rows, std::int64_t cols) {
  return {data.data(), rows, cols, cols};
}

std::vector<float> normal(std::size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> values(count);
  for (auto& v : values) v = distribution(generator);
  return values;
}

struct Layer {
  lbc::QuantFormat format;
  std::vector<std::uint8_t> codes, zeros;
  std::vector<float> scales;
  std::vector<char> packed;

  lbc::QuantWeight weight() const {
    lbc::QuantWeight w;
    w.format = format;
    w.packed = packed.data();
    w.scales = view(scales, format.groups(), format.out_features);
    return w;
  }

  double dense(std::int64_t n, std::int64_t k) const {
    const std::int64_t group = format.group_size == -1 ? format.in_features : format.group_size;
    const std::size_t at = static_cast<std::size_t>(k / group * format.out_features + n);
    const std::size_t q = static_cast<std::size_t>(n * format.in_features + k);
    return static_cast<double>(scales[at]) * (static_cast<double>(codes[q]) - zeros[at]);
  }
};

Layer make_layer(int bits, std::int64_t group_size, std::int64_t n, std::int64_t k, bool sym) {
  Layer layer;
  layer.format = {bits, group_size, k, n};
  const std::int64_t groups = layer.format.groups();
  const auto weight = normal(static_cast<std::size_t>(n * k), 7);
  layer.codes.resize(static_cast<std::size_t>(n * k));
  layer.zeros.resize(static_cast<std::size_t>(groups * n));
  layer.scales.resize(static_cast<std::size_t>(groups * n));
  lbc::quantize_rtn({weight.data(), lbc::DType::f32, n, k, k}, layer.format, {sym, false},
                    view(layer.codes, n, k), view(layer.scales, groups, n),
                    view(layer.zeros, groups, n));

  std::vector<std::int32_t> qweight(static_cast<std::size_t>(k * bits / 32 * n));
  std::vector<std::int32_t> qzeros(static_cast<std::size_t>(groups * n * bits / 32));
  lbc::pack_qweight(view(std::as_const(layer.codes), n, k), bits, view(qweight, k * bits / 32, n));
  lbc::pack_qzeros(view(std::as_const(layer.zeros), groups, n), bits,
                   view(qzeros, groups, n * bits / 32));
  layer.packed.resize(lbc::packed_size(layer.format));
  lbc::prepack(layer.format, view(std::as_const(qweight), k * bits / 32, n),
               view(std::as_const(qzeros), groups, n * bits / 32), layer.packed.data());

  std::vector<std::int32_t> words(qweight.size()), zeros(qzeros.size());
  lbc::unpack(layer.format, layer.packed.data(), view(words, k * bits / 32, n),
              view(zeros, groups, n * bits / 32));
  expect(words == qweight && zeros == qzeros, "unpack inverts prepack");
  return layer;
}

// |got - want| <= tolerance * sum |a||b|, written so that NaN fails.
void expect_close(double got, double want, double magnitude, const std::string& what) {
  expect(std::abs(got - want) <= 1e-5 * magnitude + 1e-30, what);
}

// The host brings memory of exactly the size asked for, and its own thread count.
template <typename Call>
void with_workspace(std::size_t bytes, int threads, const Call& call) {
  constexpr std::align_val_t alignment{64};
  void* memory = ::operator new(bytes, alignment);
  call(lbc::Execution{threads, memory, bytes});
  if (bytes > 64) {
    expect_error([&] { call(lbc::Execution{threads, memory, bytes - 1}); },
                 {"workspace_bytes", std::to_string(bytes)});
  }
  ::operator delete(memory, alignment);
}

void products(int bits, std::int64_t group_size, std::int64_t m) {
  const std::int64_t n = 96, k = 160;
  const Layer layer = make_layer(bits, group_size, n, k, bits == 3);
  const lbc::QuantWeight w = layer.weight();
  const std::int64_t stride = k + 5;  // rows need not be contiguous
  const auto x = normal(static_cast<std::size_t>(m * stride), 1);
  const auto dy = normal(static_cast<std::size_t>(m * n), 2);
  const auto bias = normal(static_cast<std::size_t>(n), 3);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> y(static_cast<std::size_t>(m * n), nan),
      dx(static_cast<std::size_t>(m * k), nan);
  std::vector<float> ds(static_cast<std::size_t>(layer.format.groups() * n), nan);
  const lbc::ConstMatrix xm{x.data(), lbc::DType::f32, m, k, stride};
  const lbc::ConstMatrix dym{dy.data(), lbc::DType::f32, m, n, n};

  for (int threads : {1, 3}) {
    with_workspace(lbc::qgemm_nt_workspace_size(layer.format, m, {threads}), threads,
                   [&](const auto& exec) {
                     lbc::qgemm_nt(xm, w, bias.data(), {y.data(), lbc::DType::f32, m, n, n}, exec);
                   });
    with_workspace(lbc::qgemm_nn_workspace_size(layer.format, m, {threads}), threads,
                   [&](const auto& exec) {
                     lbc::qgemm_nn(dym, w, {dx.data(), lbc::DType::f32, m, k, k}, exec);
                   });
    with_workspace(lbc::qgemm_grad_scales_workspace_size(layer.format, m, {threads}), threads,
                   [&](const auto& exec) {
                     lbc::qgemm_grad_scales(dym, xm, w, view(ds, layer.format.groups(), n), exec);
                   });
  }

  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      double sum = bias[static_cast<std::size_t>(j)], magnitude = std::abs(sum);
      for (std::int64_t c = 0; c < k; ++c) {
        const double term = x[static_cast<std::size_t>(i * stride + c)] * layer.dense(j, c);
        sum += term;
        magnitude += std::abs(term);
      }
      expect_close(y[static_cast<std::size_t>(i * n + j)], sum, magnitude, "qgemm_nt");
    }
    for (std::int64_t c = 0; c < k; ++c) {
      double sum = 0, magnitude = 0;
      for (std::int64_t j = 0; j < n; ++j) {
        const double term = dy[static_cast<std::size_t>(i * n + j)] * layer.dense(j, c);
        sum += term;
        magnitude += std::abs(term);
      }
      expect_close(dx[static_cast<std::size_t>(i * k + c)], sum, magnitude, "qgemm_nn");
    }
  }
  const std::int64_t group = group_size == -1 ? k : group_size;
  for (std::int64_t g = 0; g < layer.format.groups(); ++g) {
    for (std::int64_t j = 0; j < n; ++j) {
      double sum = 0, magnitude = 0;
      for (std::int64_t c = g * group; c < std::min(k, (g + 1) * group); ++c) {
        const double q = static_cast<double>(layer.codes[static_cast<std::size_t>(j * k + c)]) -
                         layer.zeros[static_cast<std::size_t>(g * n + j)];
        for (std::int64_t i = 0; i < m; ++i) {
          const double term = q * dy[static_cast<std::size_t>(i * n + j)] *
                              x[static_cast<std::size_t>(i * stride + c)];
          sum += term;
          magnitude += std::abs(term);
        }
      }
      expect_close(ds[static_cast<std::size_t>(g * n + j)], sum, magnitude, "qgemm_grad_scales");
    }
  }
}

void gptq(bool static_groups) {
  const std::int64_t n = 32, k = 160, m = 300;
  auto x = normal(static_cast<std::size_t>(m * k), 4);
  for (std::int64_t i = 0; i < m; ++i) {  // correlated inputs, and a dead column
    for (std::int64_t c = 1; c < k; ++c) {
      x[static_cast<std::size_t>(i * k + c)] += 0.9f * x[static_cast<std::size_t>(i * k + c - 1)];
    }
    x[static_cast<std::size_t>(i * k + 17)] = 0.0f;
  }
  const auto weight = normal(static_cast<std::size_t>(n * k), 5);
  const lbc::ConstMatrix wm{weight.data(), lbc::DType::f32, n, k, k};
  const lbc::QuantFormat format{3, 64, k, n};

  std::vector<float> hessian(static_cast<std::size_t>(k * k), 0.0f), u(hessian.size());
  lbc::accumulate_hessian({x.data(), lbc::DType::f32, m, k, k}, view(hessian, k, k));
  std::vector<std::int32_t> order(static_cast<std::size_t>(k)), g_idx(order.size());
  std::vector<std::uint8_t> dead(order.size());
  const double percdamp = lbc::gptq_factorize(view(std::as_const(hessian), k, k), {0.01, true},
                                              order.data(), dead.data(), view(u, k, k));
  expect(percdamp == 0.01, "damping is not raised without need");
  expect(dead[17] == 1 && std::count(dead.begin(), dead.end(), 1) == 1, "one dead column");

  std::vector<std::uint8_t> codes(weight.size()), zeros(static_cast<std::size_t>(3 * n));
  std::vector<float> scales(zeros.size());
  const auto objective = [&] {
    double sum = 0;
    for (std::int64_t r = 0; r < n; ++r) {
      std::vector<double> e(static_cast<std::size_t>(k));
      for (std::int64_t c = 0; c < k; ++c) {
        const std::size_t at = static_cast<std::size_t>(r * k + c);
        const std::size_t g = static_cast<std::size_t>(g_idx[static_cast<std::size_t>(c)] * n + r);
        e[static_cast<std::size_t>(c)] =
            weight[at] - scales[g] * (static_cast<double>(codes[at]) - zeros[g]);
      }
      for (std::int64_t i = 0; i < m; ++i) {
        double dot = 0;
        for (std::int64_t c = 0; c < k; ++c) {
          dot += e[static_cast<std::size_t>(c)] * x[static_cast<std::size_t>(i * k + c)];
        }
        sum += dot * dot;
      }
    }
    return sum;
  };
  lbc::gptq_quantize(wm, order.data(), dead.data(), view(std::as_const(u), k, k), format,
                     {{}, static_groups}, view(codes, n, k), view(scales, 3, n), view(zeros, 3, n),
                     g_idx.data());
  const double with_gptq = objective();
  lbc::quantize_rtn(wm, format, {}, view(codes, n, k), view(scales, 3, n), view(zeros, 3, n));
  for (std::int64_t c = 0; c < k; ++c)
    g_idx[static_cast<std::size_t>(c)] = static_cast<int>(c / 64);
  const double with_rtn = objective();
  expect(with_gptq < 0.7 * with_rtn, "GPTQ's error " + std::to_string(with_gptq) +
                                         " is well below round-to-nearest's " +
                                         std::to_string(with_rtn));

  const lbc::Execution two{2};
  with_workspace(lbc::accumulate_hessian_workspace_size(m, k, two), 2, [&](const auto& exec) {
    lbc::accumulate_hessian({x.data(), lbc::DType::f32, m, k, k}, view(hessian, k, k), exec);
  });
  with_workspace(lbc::accumulate_cross_workspace_size(m, k, two), 2, [&](const auto& exec) {
    const lbc::ConstMatrix both{x.data(), lbc::DType::f32, m, k, k};
    lbc::accumulate_cross(both, both, view(hessian, k, k), exec);
  });
  with_workspace(lbc::quantize_rtn_workspace_size(format, two), 2, [&](const auto& exec) {
    lbc::quantize_rtn(wm, format, {}, view(codes, n, k), view(scales, 3, n), view(zeros, 3, n),
                      exec);
  });
  const auto quantize = [&](const std::int32_t* in_order, std::int32_t* groups, const auto& exec) {
    lbc::gptq_quantize(wm, in_order, dead.data(), view(std::as_const(u), k, k), format,
                       {{}, static_groups}, view(codes, n, k), view(scales, 3, n),
                       view(zeros, 3, n), groups, exec);
  };
  with_workspace(lbc::gptq_quantize_workspace_size(format, two), 2,
                 [&](const auto& exec) { quantize(order.data(), g_idx.data(), exec); });
  expect_error([&] { quantize(nullptr, g_idx.data(), two); }, {"order", "null pointer"});
  expect_error([&] { quantize(order.data(), nullptr, two); }, {"g_idx", "null pointer"});
  expect_error(
      [&] {
        lbc::gptq_factorize(view(std::as_const(hessian), k, k), {}, nullptr, dead.data(),
                            view(u, k, k));
      },
      {"gptq_factorize", "order", "null pointer"});

  hessian[3] = std::numeric_limits<float>::infinity();
  expect_error(
      [&] {
        lbc::gptq_factorize(view(std::as_const(hessian), k, k), {}, order.data(), dead.data(),
                            view(u, k, k));
      },
      {"gptq_factorize", "hessian", "finite", "[0, 3]"});
}

void errors() {
  const Layer layer = make_layer(4, 32, 32, 64, false);
  const lbc::QuantWeight w = layer.weight();
  std::vector<float> x(64 * 2), y(32 * 2);
  expect_error(
      [&] {
        lbc::qgemm_nt({x.data(), lbc::DType::f32, 2, 63, 63}, w, nullptr,
                      {y.data(), lbc::DType::f32, 2, 32, 32});
      },
      {"qgemm_nt", "x", "[2, 64]", "[2, 63]"});
  expect_error(
      [&] {
        lbc::qgemm_nt({x.data(), lbc::DType::f32, 2, 64, 64}, w, nullptr,
                      {y.data(), lbc::DType::bf16, 2, 32, 32});
      },
      {"y", "float32", "bfloat16"});
  expect_error(
      [&] {
        lbc::qgemm_nt({x.data(), lbc::DType::f32, 2, 64, 8}, w, nullptr,
                      {y.data(), lbc::DType::f32, 2, 32, 32});
      },
      {"x", "stride", "64", "8"});
  expect_error([&] { lbc::packed_size({5, 32, 64, 32}); }, {"bits", "2, 3, 4 or 8", "5"});
  expect_error([&] { lbc::packed_size({4, 48, 64, 32}); }, {"group_size", "48"});
  expect_error([&] { lbc::packed_size({4, 32, 63, 32}); }, {"in_features", "63"});
  std::vector<std::int32_t> g_idx(64, 0);
  g_idx[5] = 2;
  lbc::QuantWeight bad = w;
  bad.g_idx = g_idx.data();
  expect_error(
      [&] {
        lbc::qgemm_nt({x.data(), lbc::DType::f32, 2, 64, 64}, bad, nullptr,
                      {y.data(), lbc::DType::f32, 2, 32, 32});
      },
      {"g_idx", "0 to 1", "2 at 5"});
  expect_error(
      [&] {
        lbc::qgemm_nn({x.data(), lbc::DType::f32, -1, 32, 32}, w,
                      {y.data(), lbc::DType::f32, -1, 64, 64});
      },
      {"qgemm_nn", "dy", "no negative", "[-1, 32]"});
  std::vector<std::uint8_t> codes(32 * 32);
  std::vector<std::int32_t> packed(32 * 32);
  expect_error(
      [&] { lbc::pack_qweight({codes.data(), -1, 32, 32}, 4, {packed.data(), 4, -1, -1}); },
      {"pack_qweight", "codes", "no negative"});
  expect_error(
      [&] {
        lbc::permute_columns({nullptr, lbc::DType::f32, 1, 32, 32}, packed.data(),
                             {y.data(), lbc::DType::f32, 1, 32, 32});
      },
      {"permute_columns", "x", "null pointer"});
  std::vector<float> table(4 * 64);
  expect_error(
      [&] {
        lbc::rotate({x.data(), lbc::DType::f32, 4, 0, 0},
                    {table.data(), lbc::DType::f32, 4, 64, 64},
                    {table.data(), lbc::DType::f32, 4, 64, 64}, false,
                    {y.data(), lbc::DType::f32, 4, 0, 0});
      },
      {"rotate", "x", "positive multiple of 32 columns", "0"});
  // Nothing to do is not an error.
  lbc::qgemm_nt({nullptr, lbc::DType::f32, 0, 64, 64}, w, nullptr,
                {nullptr, lbc::DType::f32, 0, 32, 32});
}

// Contiguous heads of bf16, with an element of another value behind the last.
struct HeadValues {
  std::int64_t batch, heads, rows, cols;
  std::vector<std::uint16_t> data;

  HeadValues(std::int64_t h, std::int64_t t, unsigned seed)
      : batch(2), heads(h), rows(t), cols(64) {
    const auto count = static_cast<std::size_t>(batch * heads * rows * cols);
    for (float value : normal(count + 1, seed)) {
      std::uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      data.push_back(static_cast<std::uint16_t>(bits >> 16));
    }
  }
  lbc::Heads view() {
    return {data.data(), lbc::DType::bf16,    batch,       heads, rows,
            cols,        heads * rows * cols, rows * cols, cols};
  }
  const std::uint16_t* head(std::int64_t b, std::int64_t h) const {
    return data.data() + (b * heads + h) * rows * cols;
  }
};

void attention(std::int64_t rows) {
  HeadValues q(6, rows, 1), k(2, rows, 2), v(2, rows, 3), d_out(6, rows, 4);
  const lbc::AttentionInputs in{q.view(), k.view(), v.view(), 0.125f};
  HeadValues out(6, rows, 5), dq(6, rows, 6), dk(2, rows, 7), dv(2, rows, 8);
  std::vector<float> lse(static_cast<std::size_t>(12 * rows));
  std::vector<std::vector<std::uint16_t>> first;
  for (int threads : {1, 3}) {
    const std::uint16_t behind[] = {out.data.back(), dq.data.back(), dk.data.back(),
                                    dv.data.back()};
    with_workspace(
        lbc::attention_workspace_size(lbc::DType::bf16, rows, 64, {threads}), threads,
        [&](const auto& exec) { lbc::attention(in, out.view(), view(lse, 12, rows), exec); });
    with_workspace(lbc::attention_backward_workspace_size(lbc::DType::bf16, rows, 64, {threads}),
                   threads, [&](const auto& exec) {
                     lbc::attention_backward(d_out.view(), in, out.view(),
                                             view(std::as_const(lse), 12, rows), dq.view(),
                                             dk.view(), dv.view(), exec);
                   });
    const std::uint16_t still[] = {out.data.back(), dq.data.back(), dk.data.back(), dv.data.back()};
    expect(std::equal(behind, behind + 4, still), "attention writes its results alone");
    std::vector<std::vector<std::uint16_t>> results{out.data, dq.data, dk.data, dv.data};
    if (threads == 1) first = results;
    expect(results == first, "attention does not depend on threads");
  }
  // The first query sees one key: its result is that key's value.
  for (std::int64_t b = 0; b < 2; ++b) {
    for (std::int64_t h = 0; h < 6; ++h) {
      const std::uint16_t *got = out.head(b, h), *want = v.head(b, h / 3);
      expect(std::equal(got, got + 64, want), "attention of a first query");
    }
  }
  lbc::Heads narrow = k.view();
  narrow.cols = 48;
  expect_error([&] { lbc::attention({narrow, narrow, narrow}, narrow, view(lse, 4, rows)); },
               {"attention", "q", "multiple of 32", "48"});
  expect_error([&] { lbc::attention_backward_workspace_size(lbc::DType::bf16, -1, 64); },
               {"rows", "-1"});
  lbc::Heads single = k.view();
  single.dtype = lbc::DType::f32;
  expect_error([&] { lbc::attention({k.view(), single, k.view()}, k.view(), view(lse, 4, rows)); },
               {"attention", "k", "the type of q (bfloat16)", "float32"});
  HeadValues none(2, 0, 9);
  std::vector<float> no_lse;
  lbc::attention({none.view(), none.view(), none.view()}, none.view(), view(no_lse, 4, 0));
  if (rows > 1) {
    lbc::Heads overlapping = out.view();
    overlapping.row_stride = 0;
    expect_error([&] { lbc::attention(in, overlapping, view(lse, 12, rows)); },
                 {"attention", "out", "a stride of at least 64", "0"});
    lbc::Heads turned = out.view();  // [batch, rows, heads, cols]
    turned.head_stride = 64;
    turned.row_stride = 6 * 64;
    lbc::attention(in, turned, view(lse, 12, rows));
    turned.row_stride = 5 * 64;
    expect_error([&] { lbc::attention(in, turned, view(lse, 12, rows)); },
                 {"attention", "out", "a stride of at least 384", "320"});
  }
}

// An adapter's sum, in place and apart, and its gradients, each from exactly the scratch it asks
// for.
void low_rank(std::int64_t rows) {
  const std::int64_t k = 96, n = 64, rank = 5;
  const auto size = [](std::int64_t count) { return static_cast<std::size_t>(count); };
  const auto x = normal(size(rows * k), 1), y = normal(size(rows * n), 2);
  const auto dy = normal(size(rows * n), 3);
  const auto a = normal(size(rank * k), 4), b = normal(size(n * rank), 5);
  const lbc::LowRank adapter{view(a, rank, k), view(b, n, rank), 0.5f};
  const auto matrix = [&](auto& data, std::int64_t cols) {
    return lbc::Matrix{const_cast<float*>(data.data()), lbc::DType::f32, rows, cols, cols};
  };
  std::vector<float> low(size(rows * rank)), sum(y.size()), dx(x.size());
  std::vector<float> da(a.size()), db(b.size());
  const auto close = [](float got, double want, const char* what) {
    expect(std::abs(got - want) <= 1e-4 * (1 + std::abs(want)), what);
  };
  std::vector<std::vector<float>> first;
  for (int threads : {1, 3}) {
    with_workspace(lbc::add_low_rank_workspace_size(rows, k, n, rank, {threads}), threads,
                   [&](const auto& exec) {
                     lbc::add_low_rank(matrix(y, n), matrix(x, k), adapter, view(low, rows, rank),
                                       matrix(sum, n), exec);
                   });
    with_workspace(lbc::add_low_rank_backward_workspace_size(rows, k, n, rank, {threads}), threads,
                   [&](const auto& exec) {
                     lbc::add_low_rank_backward(
                         matrix(dy, n), matrix(x, k), view(std::as_const(low), rows, rank), adapter,
                         {matrix(dx, k), view(da, rank, k), view(db, n, rank)}, exec);
                   });
    std::vector<std::vector<float>> results{low, sum, dx, da, db};
    if (threads == 1) first = results;
    expect(results == first, "an adapter's results do not depend on threads");
  }
  const auto dot = [](std::int64_t count, const float* p, std::int64_t p_step, const float* q,
                      std::int64_t q_step) {
    double total = 0;
    for (std::int64_t i = 0; i < count; ++i) total += double{p[i * p_step]} * q[i * q_step];
    return total;
  };
  for (std::int64_t m = 0; m < rows; ++m) {
    for (std::int64_t i = 0; i < n; ++i) {
      close(sum[size(m * n + i)],
            y[size(m * n + i)] + dot(rank, &low[size(m * rank)], 1, &b[size(i * rank)], 1),
            "an adapter's sum");
    }
    for (std::int64_t r = 0; r < rank; ++r) {
      close(low[size(m * rank + r)], 0.5 * dot(k, &x[size(m * k)], 1, &a[size(r * k)], 1),
            "an adapter's narrow product");
    }
  }
  for (std::int64_t i = 0; i < rank * k; ++i) {
    double total = 0;
    for (std::int64_t m = 0; m < rows; ++m) {
      total += 0.5 * dot(n, &dy[size(m * n)], 1, &b[size(i / k)], rank) * x[size(m * k + i % k)];
    }
    close(da[size(i)], total, "the gradient of a");
  }
  for (std::int64_t i = 0; i < rows * k; ++i) {
    double total = 0;
    for (std::int64_t r = 0; r < rank; ++r) {
      total += 0.5 * dot(n, &dy[size(i / k * n)], 1, &b[size(r)], rank) * a[size(r * k + i % k)];
    }
    close(dx[size(i)], total, "the gradient of an adapter's input");
  }
  for (std::int64_t i = 0; i < n * rank; ++i) {
    close(db[size(i)], dot(rows, &dy[size(i / rank)], n, &low[size(i % rank)], rank),
          "the gradient of b");
  }
  std::vector<float> in_place = y, other = dx;
  lbc::add_low_rank(matrix(in_place, n), matrix(x, k), adapter, view(low, rows, rank),
                    matrix(in_place, n));
  expect(in_place == sum, "an adapter in place");
  lbc::add_low_rank_backward(matrix(dy, n), {}, {}, adapter, {matrix(other, k), {}, {}});
  expect(other == dx, "the gradient of x alone");
  expect_error(
      [&] {
        lbc::add_low_rank_backward(matrix(dy, n), {}, {}, adapter,
                                   {{}, view(da, rank, k), view(db, n, rank)});
      },
      {"add_low_rank_backward", "x"});
  expect_error([&] { lbc::add_low_rank_workspace_size(1, 48, 64, 1); }, {"in_features", "48"});
  expect_error([&] { lbc::add_low_rank_workspace_size(1, 64, 64, -1); }, {"rank", "-1"});
}

void dense(std::int64_t rows) {
  const std::int64_t k = 64, n = 600;  // more than a slice of a reduction, and no panels
  const auto size = [](std::int64_t count) { return static_cast<std::size_t>(count); };
  const auto x = normal(size(rows * k), 1), w = normal(size(n * k), 2),
             dy = normal(size(rows * n), 3);
  const auto bias = normal(size(n), 4);
  std::vector<float> y(dy.size()), dx(x.size());
  const auto matrix = [](auto& data, std::int64_t height, std::int64_t cols) {
    return lbc::Matrix{const_cast<float*>(data.data()), lbc::DType::f32, height, cols, cols};
  };
  std::vector<std::vector<float>> first;
  for (int threads : {1, 3}) {
    with_workspace(lbc::gemm_nt_workspace_size(rows, k, {threads}), threads, [&](const auto& exec) {
      lbc::gemm_nt(matrix(x, rows, k), matrix(w, n, k), bias.data(), matrix(y, rows, n), exec);
    });
    with_workspace(lbc::gemm_nn_workspace_size(rows, k, {threads}), threads, [&](const auto& exec) {
      lbc::gemm_nn(matrix(dy, rows, n), matrix(w, n, k), bias.data(), matrix(dx, rows, k), exec);
    });
    const std::vector<std::vector<float>> results{y, dx};
    if (threads == 1) first = results;
    expect(results == first, "dense products do not depend on threads");
  }
  const auto close = [](float got, double want, const char* what) {
    expect(std::abs(got - want) <= 1e-4 * (1 + std::abs(want)), what);
  };
  for (std::int64_t m = 0; m < rows; ++m) {
    for (std::int64_t j = 0; j < n; ++j) {
      double total = bias[size(j)];
      for (std::int64_t i = 0; i < k; ++i) total += double{x[size(m * k + i)]} * w[size(j * k + i)];
      close(y[size(m * n + j)], total, "a dense product");
    }
    for (std::int64_t i = 0; i < k; ++i) {
      double total = bias[size(i)];
      for (std::int64_t j = 0; j < n; ++j)
        total += double{dy[size(m * n + j)]} * w[size(j * k + i)];
      close(dx[size(m * k + i)], total, "a transposed dense product");
    }
  }
  expect_error(
      [&] { lbc::gemm_nt(matrix(x, rows, k), matrix(w, n, 32), nullptr, matrix(y, rows, n)); },
      {"gemm_nt", "weight", "64", "32"});
  expect_error([&] { lbc::gemm_nn_workspace_size(1, 48); }, {"cols", "48"});
}

// The gradient in the place of the logits, and in that of the teacher's.
void losses_in_place() {
  const std::int64_t tokens = 3, words = 96;
  const auto logits = normal(static_cast<std::size_t>(tokens * words), 9);
  const auto teacher = normal(logits.size(), 10);
  const std::vector<std::int64_t> targets{5, 95, 40};
  std::vector<float> values(3);
  const auto run = [&](const float* own, const float* other, float* gradient, bool reverse) {
    const auto matrix = [&](auto* data) {
      return lbc::ConstMatrix{data, lbc::DType::f32, tokens, words, words};
    };
    lbc::token_losses(matrix(own), view(targets, 1, tokens), {0.5f, matrix(other), 1.5f, reverse},
                      view(values, 1, tokens), {gradient, lbc::DType::f32, tokens, words, words});
  };
  for (bool reverse : {false, true}) {
    std::vector<float> apart(logits.size()), own = logits, other = teacher;
    run(logits.data(), teacher.data(), apart.data(), reverse);
    run(own.data(), teacher.data(), own.data(), reverse);
    run(logits.data(), other.data(), other.data(), reverse);
    expect(own == apart && other == apart, "token_losses in place");
  }
}

// Results in the place of inputs, as the headers allow.
void elementwise_in_place() {
  const std::int64_t rows = 5, cols = 192;
  const auto a = normal(static_cast<std::size_t>(rows * cols), 21);
  const auto b = normal(a.size(), 22), c = normal(a.size(), 23);
  const auto weight = normal(static_cast<std::size_t>(cols), 24);
  const auto matrix = [&](auto& data) {
    return lbc::Matrix{const_cast<float*>(data.data()), lbc::DType::f32, rows, cols, cols};
  };
  const lbc::ConstMatrix scale{weight.data(), lbc::DType::f32, 1, cols, cols};
  const lbc::ConstMatrix turn{b.data(), lbc::DType::f32, rows, 64, cols};
  using Run = std::function<void(lbc::Matrix, lbc::Matrix)>;  // from a copy of a, to a result
  const std::vector<std::pair<std::string, Run>> runs = {
      {"rms_norm", [&](auto x, auto y) { lbc::rms_norm(x, scale, 1e-5f, y); }},
      {"rms_norm_backward, dy",
       [&](auto x, auto y) { lbc::rms_norm_backward(x, matrix(b), scale, 1e-5f, y); }},
      {"rms_norm_backward, x",
       [&](auto x, auto y) { lbc::rms_norm_backward(matrix(b), x, scale, 1e-5f, y); }},
      {"rotate", [&](auto x, auto y) { lbc::rotate(x, turn, turn, false, y); }},
      {"rotate back", [&](auto x, auto y) { lbc::rotate(x, turn, turn, true, y); }},
      {"swiglu, gate", [&](auto x, auto y) { lbc::swiglu(x, matrix(b), y); }},
      {"swiglu, up", [&](auto x, auto y) { lbc::swiglu(matrix(b), x, y); }},
      {"dropout", [&](auto x, auto y) { lbc::dropout(x, 7, 9000, y); }},
  };
  for (const auto& [name, run] : runs) {
    std::vector<float> in_place = a, from = a, to(a.size(), NAN);
    run(matrix(from), matrix(to));
    run(matrix(in_place), matrix(in_place));
    expect(from == a && in_place == to, name + " in place");
  }
  for (int which = 0; which < 6; ++which) {
    std::vector<float> in[3] = {a, b, c}, gate(a.size(), NAN), up(a.size(), NAN);
    lbc::swiglu_backward(matrix(in[0]), matrix(in[1]), matrix(in[2]), matrix(gate), matrix(up));
    std::vector<float>& d_gate = in[which / 2];
    std::vector<float>& d_up = in[(which / 2 + 1 + which % 2) % 3];
    lbc::swiglu_backward(matrix(in[0]), matrix(in[1]), matrix(in[2]), matrix(d_gate), matrix(d_up));
    expect(d_gate == gate && d_up == up, "swiglu_backward in place");
  }
}

// Products do not write over what they read, but may write beside it.
void products_apart() {
  const Layer layer = make_layer(4, 32, 64, 64, false);
  std::vector<float> both(3 * 160, 1.0f), weight(64 * 64, 0.5f), y(3 * 64);
  const auto at = [&](std::int64_t column, std::int64_t stride = 160) {
    return lbc::Matrix{both.data() + column, lbc::DType::f32, 3, 64, stride};
  };
  const lbc::ConstMatrix dense{weight.data(), lbc::DType::f32, 64, 64, 64};
  const lbc::LowRank adapter{view(std::as_const(weight), 2, 64),
                             view(std::as_const(weight), 64, 2)};
  const std::vector<std::pair<std::string, std::function<void(lbc::Matrix, lbc::Matrix)>>> runs = {
      {"gemm_nt", [&](auto x, auto to) { lbc::gemm_nt(x, dense, nullptr, to); }},
      {"gemm_nn", [&](auto x, auto to) { lbc::gemm_nn(x, dense, nullptr, to); }},
      {"qgemm_nt", [&](auto x, auto to) { lbc::qgemm_nt(x, layer.weight(), nullptr, to); }},
      {"qgemm_nn", [&](auto x, auto to) { lbc::qgemm_nn(x, layer.weight(), to); }},
      {"add_low_rank_backward",
       [&](auto dy, auto to) { lbc::add_low_rank_backward(dy, {}, {}, adapter, {to, {}, {}}); }},
  };
  for (const auto& [name, run] : runs) {
    for (std::int64_t column : {0, 1, 63, 95}) {
      expect_error([&] { run(at(column), at(32)); }, {name, "apart", "overlaps"});
      expect_error([&] { run(at(32), at(column)); }, {name, "apart", "overlaps"});
    }
    expect_error([&] { run(at(0), at(0, 128)); }, {name, "overlaps"});
    const auto x = normal(both.size(), 31);
    both = x;
    const lbc::Matrix apart{y.data(), lbc::DType::f32, 3, 64, 64};
    run(at(64), apart);
    run(at(64), at(0));
    for (std::size_t i = 0; i < y.size(); ++i) {
      expect(both[i / 64 * 160 + i % 64] == y[i], name + " beside its input");
    }
  }
  std::vector<float> low(3 * 2), da(2 * 64);
  expect_error(
      [&] {
        lbc::add_low_rank_backward(at(0), at(64), view(std::as_const(low), 3, 2), adapter,
                                   {at(32 + 64), view(da, 2, 64), {}});
      },
      {"add_low_rank_backward", "dx", "apart from that of x"});
  const lbc::View<float> inside{y.data() + 32, 2, 64, 64};
  expect_error(
      [&] {
        lbc::add_low_rank_backward(at(0), {y.data(), lbc::DType::f32, 3, 64, 64},
                                   view(std::as_const(low), 3, 2), adapter, {{}, inside, {}});
      },
      {"add_low_rank_backward", "da", "apart from that of x"});
  const lbc::Matrix dy{y.data(), lbc::DType::f32, 3, 64, 64};
  for (const auto& [of_dy, of_x, name] :
       {std::tuple{at(0), dy, "dy"}, std::tuple{dy, at(0), "x"}}) {
    expect_error(
        [&, dy = of_dy, x = of_x] {
          lbc::qgemm_grad_scales(dy, x, layer.weight(), {both.data() + 32, 2, 64, 64});
        },
        {"qgemm_grad_scales", "ds", std::string("apart from that of ") + name});
  }
}

// Sizes of what is too large to count are errors, not numbers that ran over.
void sizes_are_bounded() {
  const std::int64_t many = std::int64_t{1} << 58;
  const lbc::QuantFormat format{4, 64, 64, 64};
  for (const std::int64_t rows : {many, std::int64_t{-1}}) {
    const std::string got = std::to_string(rows);
    expect_error([&] { lbc::qgemm_nt_workspace_size(format, rows); }, {"m", "2^30", got});
    expect_error([&] { lbc::gemm_nt_workspace_size(rows, 64); }, {"rows", "2^30", got});
    expect_error([&] { lbc::add_low_rank_workspace_size(8, 64, 64, rows); }, {"rank", got});
    expect_error([&] { lbc::attention_workspace_size(lbc::DType::f32, rows, 64); }, {"rows", got});
  }
  expect_error([] { lbc::attention_workspace_size(static_cast<lbc::DType>(9), 8, 64); },
               {"attention_workspace_size", "dtype", "float32, bfloat16 or float16"});
  lbc::Execution cuda;
  cuda.device = lbc::Device::cuda;
  std::int32_t word = 0;
  const std::int64_t wide = std::int64_t{1} << 26;
  expect_error([&] { lbc::prepack({8, 64, wide, 64}, {}, {}, &word, cuda); },
               {"prepack", "in_features", "2^22 on CUDA"});
}

// The scratch of a call is for the threads that it uses, whatever another thread sets meanwhile.
void threads_set_during_calls() {
  const Layer layer = make_layer(4, 64, 128, 256, false);
  const auto x = normal(64 * 256, 11);
  std::vector<float> y(64 * 128);
  lbc::Execution exec;
  exec.num_threads = 1;
  const std::size_t bytes = lbc::qgemm_nt_workspace_size(layer.format, 64, exec);
  constexpr std::size_t kBehind = 1 << 20;
  std::vector<unsigned char> memory(bytes + kBehind + 64, 0xab);
  const auto misaligned = reinterpret_cast<std::uintptr_t>(memory.data()) % 64;
  unsigned char* workspace = memory.data() + (64 - misaligned) % 64;
  exec = {0, workspace, bytes};
  std::atomic<bool> stop{false};
  std::thread other([&] {
    for (int i = 0; !stop; ++i) lbc::set_num_threads(1 + i % 2);
  });
  // Long enough: where it went wrong, it did within two seconds.
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(3);
  while (std::chrono::steady_clock::now() < end) {
    try {
      lbc::qgemm_nt({x.data(), lbc::DType::f32, 64, 256, 256}, layer.weight(), nullptr,
                    {y.data(), lbc::DType::f32, 64, 128, 128}, exec);
    } catch (const std::invalid_argument&) {  // of two threads it is not enough
    }
  }
  stop = true;
  other.join();
  lbc::set_num_threads(0);
  expect(std::all_of(workspace + bytes, workspace + bytes + kBehind - 64,
                     [](unsigned char byte) { return byte == 0xab; }),
         "a call writes into its workspace alone");
}

void threads_are_few() {
  expect_error([] { lbc::set_num_threads(1025); }, {"num_threads", "0 to 1024", "1025"});
  expect_error([] { lbc::set_num_threads(-1); }, {"num_threads", "0 to 1024", "-1"});
  expect_error([] { lbc::qgemm_nt_workspace_size({4, 64, 64, 64}, 1, {-5}); },
               {"num_threads", "0 to 1024", "-5"});
}

// What Python cannot hand over, either.
void unknown_kinds() {
  std::vector<float> values(64 * 64), y(64);
  const lbc::ConstMatrix w{values.data(), lbc::DType::f32, 64, 64, 64};
  const auto none = static_cast<lbc::DType>(7);
  lbc::Matrix x{values.data(), none, 1, 64, 64}, to{y.data(), none, 1, 64, 64};
  expect_error([&] { lbc::gemm_nt(x, {values.data(), none, 64, 64, 64}, nullptr, to); },
               {"gemm_nt", "float32, bfloat16 or float16"});
  x.dtype = to.dtype = lbc::DType::f32;
  lbc::Execution exec;
  exec.device = static_cast<lbc::Device>(5);
  expect_error([&] { lbc::gemm_nt(x, w, nullptr, to, exec); }, {"device", "cpu or cuda"});
  exec = {1, reinterpret_cast<void*>(reinterpret_cast<std::uintptr_t>(values.data()) | 4), 1 << 20};
  expect_error([&] { lbc::gemm_nt(x, w, nullptr, to, exec); }, {"workspace", "64 bytes"});
  expect(lbc::QuantFormat{4, 0, 64, 64}.groups() == 1, "no group size");
  expect(lbc::QuantFormat{4, std::numeric_limits<std::int64_t>::max(), 64, 64}.groups() == 1,
         "a group of any size");
  const std::int32_t order[64] = {};
  exec = {};
  exec.device = lbc::Device::cuda;
  try {
    lbc::permute_columns(x, order, to, exec);
    expect(false, "an error for what is not on the CPU");
  } catch (const lbc::Error&) {
  }
}

// Of a weight whose inputs are in another order, whose adapters' are not.
void in_order(std::int64_t rows) {
  const Layer layer = make_layer(4, 32, 64, 64, false);
  const lbc::QuantWeight w = layer.weight();
  std::vector<std::int32_t> order(64);
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::int32_t>(63 - i);
  const auto size = static_cast<std::size_t>(rows * 64);
  const auto x = normal(size, 41), bias = normal(64, 42), ones = std::vector<float>(64, 1.0f);
  const auto a = normal(8 * 64, 43), b = normal(64 * 8, 44);
  const auto matrix = [&](auto& data) {
    return lbc::Matrix{const_cast<float*>(data.data()), lbc::DType::f32, rows, 64, 64};
  };
  std::vector<float> permuted(size), expected(size), found(size, NAN);
  const auto multiply = [&](const std::vector<float>& from) {
    lbc::permute_columns(matrix(from), order.data(), matrix(permuted));
    lbc::qgemm_nt(matrix(permuted), w, bias.data(), matrix(expected));
  };
  multiply(x);
  lbc::qgemm_nt_in_order(matrix(x), order.data(), w, bias.data(), matrix(found));
  expect(found == expected, "qgemm_nt_in_order");
  lbc::qgemm_nt(matrix(x), w, bias.data(), matrix(expected));
  lbc::qgemm_nt_in_order(matrix(x), nullptr, w, bias.data(), matrix(found));
  expect(found == expected, "qgemm_nt_in_order of columns as they are");

  const lbc::LowRank adapter{view(a, 8, 64), view(b, 64, 8), 0.5f};
  const lbc::ConstMatrix scale{ones.data(), lbc::DType::f32, 1, 64, 64};
  const lbc::Norm norm{scale, 1e-5f};
  const lbc::AdaptedWeight plain{w}, adapted{w, bias.data(), order.data(), &adapter, 1};
  std::vector<float> normed(size), q(size), k(size), low(static_cast<std::size_t>(rows * 8));
  lbc::rms_norm(matrix(x), scale, 1e-5f, matrix(normed));
  multiply(normed);
  lbc::add_low_rank(matrix(expected), matrix(normed), adapter, view(low, rows, 8),
                    matrix(expected));
  lbc::project_token(matrix(x), {norm, plain, plain, adapted, {}, {}}, scale, scale, matrix(q),
                     matrix(k), matrix(found));
  expect(found == expected, "project_token in order");
  for (const std::int32_t bad : {-1, 64}) {
    order[63] = bad;
    expect_error(
        [&] {
          lbc::project_token(matrix(x), {norm, plain, plain, adapted, {}, {}}, scale, scale,
                             matrix(q), matrix(k), matrix(found));
        },
        {"order", "0 to 63", std::to_string(bad)});
  }
  expect_error(
      [&] {
        lbc::qgemm_nt_in_order({x.data(), lbc::DType::f32, 1, 32, 32}, order.data(), w, nullptr,
                               matrix(found));
      },
      {"qgemm_nt", "x", "64", "32"});
}

// What Python cannot hand over.
void decode_errors() {
  std::vector<float> values(256);
  const lbc::ConstMatrix q{values.data(), lbc::DType::f32, 1, 64, 64};
  const lbc::Matrix out{values.data(), lbc::DType::f32, 1, 64, 64};
  const std::int64_t many = std::int64_t{1} << 59;
  const lbc::ConstHeads keys{values.data(), lbc::DType::f32, 1, many, 1, 32, 32, 32, 32};
  expect_error([&] { lbc::attend(q, keys, keys, 1.0f, out); }, {"attend", "keys", "divides q's"});
  const Layer layer = make_layer(4, 32, 64, 64, false);
  lbc::AdaptedWeight weight{layer.weight()};
  weight.adapter_count = 1;
  const lbc::LowRank negative{{values.data(), -1, 64, 64}, {values.data(), 64, -1, 64}};
  const lbc::Norm norm{q, 1e-5f};
  expect_error(
      [&] { lbc::project_token(q, {norm, weight, weight, weight, {}, {}}, q, q, out, out, out); },
      {"project_token", "adapters", "null"});
  expect_error(
      [&] { lbc::project_token(q, {{}, weight, weight, weight, {}, {}}, q, q, out, out, out); },
      {"project_token", "norm", "[1, 64]"});
  const Layer other = make_layer(4, 32, 96, 64, false);
  const lbc::AdaptedWeight wide{other.weight()};
  expect_error(
      [&] { lbc::project_token(q, {norm, weight, wide, weight, {}, {}}, q, q, out, out, out); },
      {"project_token", "k", "64 x 64", "96 x 64"});
  expect_error([&] { lbc::accumulate_hessian_workspace_size(1000, many * 8); },
               {"cols", "at most 2^30"});
  weight.adapters = &negative;
  expect_error(
      [&] { lbc::project_token(q, {norm, weight, weight, weight, {}, {}}, q, q, out, out, out); },
      {"project_token", "rank", "-1"});
  const lbc::ConstMatrix two{values.data(), lbc::DType::f32, 2, 64, 64};
  const lbc::AdaptedWeight plain{layer.weight()};
  expect_error(
      [&] { lbc::project_token(q, {norm, plain, plain, plain, {}, {}}, two, two, out, out, out); },
      {"project_token", "cos", "1 row or 1", "2"});
}

}  // namespace

int main(int argc, char** argv) {
  const std::string level = argc > 1 ? argv[1] : "scalar";
  const auto levels = lbc::available_isas();
  if (std::find(levels.begin(), levels.end(), level) == levels.end()) {
    std::printf("this machine has no %s\n", level.c_str());
    return 77;
  }
  lbc::set_isa(level);
  expect(lbc::isa() == level, "the forced level is in use");
  for (int bits : {2, 3, 4, 8}) {
    for (std::int64_t group_size : {32, 64, -1}) {
      for (std::int64_t m : {1, 13, 500}) products(bits, group_size, m);
    }
  }
  gptq(true);
  gptq(false);
  for (std::int64_t rows : {1, 31, 100, 600}) attention(rows);
  for (std::int64_t rows : {1, 4, 5, 70}) low_rank(rows);
  for (std::int64_t rows : {1, 3, 40}) dense(rows);
  for (std::int64_t rows : {1, 20}) in_order(rows);
  losses_in_place();
  elementwise_in_place();
  products_apart();
  sizes_are_bounded();
  unknown_kinds();
  threads_set_during_calls();
  threads_are_few();
  decode_errors();
  errors();
  if (failures == 0) std::printf("all checks hold at level %s\n", level.c_str());
  return failures == 0 ? 0 : 1;
}

// GPTQ (Frantar et al., arXiv 2210.17323), group-wise, with act-order and static groups.
//
// Given the same weight and Hessian, the integers are the same on every instruction set and for
// every number of threads.
#pragma once

#include <lowbitcore/quantize.h>

namespace lowbitcore {

// hessian [K,K] += x^T x for x [M,K]; both triangles are kept.
void accumulate_hessian(ConstMatrix x, View<float> hessian, const Execution& exec = {});
std::size_t accumulate_hessian_workspace_size(std::int64_t rows, std::int64_t cols,
                                              const Execution& exec = {});

// cross [K,K] += a^T b for a, b [M,K]: how two inputs of the same linear go together.
void accumulate_cross(ConstMatrix a, ConstMatrix b, View<float> cross, const Execution& exec = {});
std::size_t accumulate_cross_workspace_size(std::int64_t rows, std::int64_t cols,
                                            const Execution& exec = {});

struct FactorOptions {
  double percdamp = 0.01;  // damping, as a fraction of the mean of the diagonal; from 0 to 1
  bool act_order = true;   // process columns by falling diagonal of the Hessian
};

// The upper triangular U with H^-1 = U^T U, in processing order, from one reversed Cholesky
// factorisation: H = R R^T with R upper triangular, U = R^-1. Columns with H_ii = 0 are dead: they
// never saw an input, and quantize as zero. Where the factorisation fails the damping is raised
// tenfold (from 0 to 1e-4), at most three times; the return value is the percdamp that was used.
// Throws Error if that does not help either. The Hessian is finite. On the CPU alone, in doubles of
// its own and not in a host's workspace: K^2 and 768 K of them, K rounded up to a multiple of 96.
double gptq_factorize(View<const float> hessian, const FactorOptions& options, std::int32_t* order,
                      std::uint8_t* dead, View<float> u, const Execution& exec = {});

struct GptqOptions {
  GridOptions grid;
  // Static: groups follow the original columns, grids come from the original weights, g_idx stays
  // trivial. Otherwise a group is a run of columns in processing order, and its grid is found when
  // it is reached, on the weights as updated so far.
  bool static_groups = true;
};

// Quantizes weight [N,K], finite as for quantize_rtn, with a factor from gptq_factorize. Codes are
// in original column order; g_idx [K] is filled in either mode. Returns tr(E H E^T), E the
// quantization error, H as damped.
double gptq_quantize(ConstMatrix weight, const std::int32_t* order, const std::uint8_t* dead,
                     View<const float> u, const QuantFormat& format, const GptqOptions& options,
                     View<std::uint8_t> codes, View<float> scales, View<std::uint8_t> zeros,
                     std::int32_t* g_idx, const Execution& exec = {});
std::size_t gptq_quantize_workspace_size(const QuantFormat& format, const Execution& exec = {});

}  // namespace lowbitcore

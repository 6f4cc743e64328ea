// Quantizes a matrix to 4 bits and multiplies by it.
#include <lowbitcore/lowbitcore.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace lbc = lowbitcore;

int main() {
  const std::int64_t n = 64, k = 96;
  const lbc::QuantFormat format{4, 32, k, n};
  const std::int64_t groups = format.groups();

  std::vector<float> weight(n * k), x(k, 1.0f), y(n), scales(groups * n);
  for (std::int64_t i = 0; i < n * k; ++i) weight[i] = std::sin(static_cast<float>(i));
  std::vector<std::uint8_t> codes(n * k), zeros(groups * n), packed(lbc::packed_size(format));
  std::vector<std::int32_t> qweight(k * format.bits / 32 * n),
      qzeros(groups * n * format.bits / 32);

  lbc::quantize_rtn({weight.data(), lbc::DType::f32, n, k, k}, format, {}, {codes.data(), n, k, k},
                    {scales.data(), groups, n, n}, {zeros.data(), groups, n, n});
  lbc::pack_qweight({codes.data(), n, k, k}, format.bits,
                    {qweight.data(), k * format.bits / 32, n, n});
  lbc::pack_qzeros({zeros.data(), groups, n, n}, format.bits,
                   {qzeros.data(), groups, n * format.bits / 32, n * format.bits / 32});
  lbc::prepack(format, {qweight.data(), k * format.bits / 32, n, n},
               {qzeros.data(), groups, n * format.bits / 32, n * format.bits / 32}, packed.data());

  lbc::QuantWeight w{format, packed.data(), {scales.data(), groups, n, n}, nullptr};
  lbc::qgemm_nt({x.data(), lbc::DType::f32, 1, k, k}, w, nullptr,
                {y.data(), lbc::DType::f32, 1, n, n});

  double worst = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    double exact = 0, bound = 0;
    for (std::int64_t j = 0; j < k; ++j) {
      exact += weight[i * k + j];
      bound += scales[j / 32 * n + i];  // rounding moves a weight by less than one step
    }
    worst = std::fmax(worst, std::abs(y[i] - exact) / bound);
  }
  std::printf("lowbitcore %s on %s: error %.3f of the bound\n", lbc::version().c_str(),
              lbc::isa().c_str(), worst);
  return worst <= 1.0 ? 0 : 1;
}

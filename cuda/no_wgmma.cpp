// In place of the kernels of gemm_wgmma.cuh, in a build for architectures other than sm_90.
#include <lowbitcore/runtime.h>

#include "cuda_check.h"
#include "kernels.h"

namespace lowbitcore {

bool cuda_has_wgmma() { return false; }

namespace cuda {

namespace {

[[noreturn]] void fail() {
  throw Error("this build of lowbitcore has no kernels for sm_90a (CMAKE_CUDA_ARCHITECTURES)");
}

}  // namespace

bool supports_wgmma() { return false; }

template <int kBits>
void launch_qgemm_nt_wgmma(DType, const GemmArgs&, int, cudaStream_t) {
  fail();
}
template <int kBits>
void launch_qgemm_nn_wgmma(DType, const GemmArgs&, int, cudaStream_t) {
  fail();
}

template decltype(launch_qgemm_nt_wgmma<2>) launch_qgemm_nt_wgmma<2>;
template decltype(launch_qgemm_nt_wgmma<3>) launch_qgemm_nt_wgmma<3>;
template decltype(launch_qgemm_nt_wgmma<4>) launch_qgemm_nt_wgmma<4>;
template decltype(launch_qgemm_nt_wgmma<8>) launch_qgemm_nt_wgmma<8>;
template decltype(launch_qgemm_nn_wgmma<2>) launch_qgemm_nn_wgmma<2>;
template decltype(launch_qgemm_nn_wgmma<3>) launch_qgemm_nn_wgmma<3>;
template decltype(launch_qgemm_nn_wgmma<4>) launch_qgemm_nn_wgmma<4>;
template decltype(launch_qgemm_nn_wgmma<8>) launch_qgemm_nn_wgmma<8>;

}  // namespace cuda

}  // namespace lowbitcore

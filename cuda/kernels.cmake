# The sources of the CUDA backend, in cuda_sources. Tensor-core kernels are one object for each family
# and width, so that they compile side by side.
set(cuda_sources
  cuda/backend_cuda.cpp
  cuda/checks.cu
  cuda/dequantize.cu
  cuda/devices.cpp
  cuda/gptq.cu
  cuda/prepack.cu
  cuda/qgemm_simt.cu
  cuda/quantize_rtn.cu
  cuda/reduce.cu)
foreach(family qgemm_nt qgemm_nn qgemm_grad_scales)
  foreach(bits 2 3 4 8)
    set(instance "${CMAKE_CURRENT_BINARY_DIR}/cuda/${family}_${bits}.cu")
    configure_file(cuda/instance.cu.in "${instance}" @ONLY)
    list(APPEND cuda_sources "${instance}")
  endforeach()
endforeach()

# The sources of the CUDA backend, in cuda_sources. Tensor-core kernels are one object for each family:
# for each width, too, half of the time went to reading the same headers again.
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

function(lowbitcore_kernels result)
  set(sources)
  foreach(family ${ARGN})
    set(source "${CMAKE_CURRENT_BINARY_DIR}/cuda/${family}.cu")
    configure_file(cuda/family.cu.in "${source}" @ONLY)
    list(APPEND sources "${source}")
  endforeach()
  set(${result} ${sources} PARENT_SCOPE)
endfunction()

lowbitcore_kernels(kernels qgemm_nt qgemm_nn qgemm_grad_scales)
list(APPEND cuda_sources ${kernels})

# wgmma is there on sm_90a and nowhere else, before or after: a target with this one architecture.
set(wgmma_architecture)
if(LOWBITCORE_EMULATE_CUDA)
  set(wgmma_architecture 90a-virtual)
elseif("${CMAKE_CUDA_ARCHITECTURES};" MATCHES "(^|;)(90a?(-|;)|all)"
    OR (CMAKE_CUDA_ARCHITECTURES STREQUAL "native" AND CMAKE_CUDA_ARCHITECTURES_NATIVE MATCHES "90"))
  set(wgmma_architecture 90a-real)
endif()
if(wgmma_architecture)
  lowbitcore_kernels(kernels qgemm_nt_wgmma qgemm_nn_wgmma)
  add_library(lowbitcore_wgmma OBJECT ${kernels})
  set_target_properties(lowbitcore_wgmma PROPERTIES
    CUDA_ARCHITECTURES "${wgmma_architecture}"
    CUDA_STANDARD 17
    CUDA_STANDARD_REQUIRED ON)
  target_include_directories(lowbitcore_wgmma PRIVATE cuda cpp/include)
  target_compile_options(lowbitcore_wgmma PRIVATE -Xcompiler=-Wall,-Wextra)
  list(APPEND cuda_sources $<TARGET_OBJECTS:lowbitcore_wgmma>)
  set_source_files_properties(cuda/backend_cuda.cpp cuda/devices.cpp PROPERTIES
    COMPILE_DEFINITIONS LOWBITCORE_WITH_WGMMA)
endif()

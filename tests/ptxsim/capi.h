/* The simulator of this shared object, for other languages. Functions that can fail return 0, or 1
   with ptxsim_error() set. Strings stay valid until the next call. */
#pragma once

#include <stdint.h>

#define PTXSIM_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

PTXSIM_API int ptxsim_load(const char* ptx);
PTXSIM_API const char* ptxsim_error(void);
PTXSIM_API const char* ptxsim_kernels(void);
PTXSIM_API const char* ptxsim_parameters(
    const char* kernel); /* "offset bytes" a line, NULL: failed */

PTXSIM_API void ptxsim_add_region(const void* pointer, uint64_t bytes);
PTXSIM_API void ptxsim_remove_region(const void* pointer);
PTXSIM_API void ptxsim_clear_regions(void);
PTXSIM_API uint64_t ptxsim_allocated_bytes(void); /* by cudaMalloc and its like, and not freed */

PTXSIM_API int ptxsim_set_option(const char* name, int64_t value);
PTXSIM_API int64_t ptxsim_get_option(const char* name);

PTXSIM_API int ptxsim_launch(const char* kernel, const uint32_t grid[3], const uint32_t block[3],
                             uint32_t dynamic_shared, const void* parameters, uint32_t bytes);

PTXSIM_API const char* ptxsim_log_json(void);
PTXSIM_API void ptxsim_clear_log(void);

#ifdef __cplusplus
}
#endif

// What the library runs on: instruction set, threads, devices.
#pragma once

#include <string>
#include <vector>

namespace lowbitcore {

// Levels from slowest to fastest that this build holds and this CPU can run.
std::vector<std::string> available_isas();

// The level in use. The first call chooses the fastest, or what LOWBITCORE_ISA names; Error if the
// CPU or the build lacks that.
std::string isa();

// Forces a level (tests, comparisons). Throws Error if it is not available.
void set_isa(const std::string& name);

// Threads of the operations, at most 1,024; the default follows OpenMP (OMP_NUM_THREADS). 0
// restores the default. OpenMP's threads do not survive fork: the child of a process that has used
// several must use one.
void set_num_threads(int num_threads);
int get_num_threads();

// One line on CUDA: the devices, or why there are none.
std::string cuda_status();

// Why kernels cannot run on the CUDA device of this number, such as that the build has none for its
// architecture; empty where they can.
std::string cuda_why_not(int device);

// Whether this build has the kernels that only sm_90 runs: without them others, slower, compute
// there.
bool cuda_has_wgmma();

std::string version();

}  // namespace lowbitcore

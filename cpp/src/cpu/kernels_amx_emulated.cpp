// The AMX level on tiles in software: what tests run where the processor has no AMX.

#define LOWBITCORE_EMULATED_TILES
#include "kernels_amx.cpp"

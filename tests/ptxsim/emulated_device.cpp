// Takes the place of python/bindings/device.cpp in a build for the interpreter: arrays on the CPU
// are what device memory is there, so that all operations go to the CUDA backend.
#include <views.h>

namespace lowbitcore::python {

Device device_of(const char*, const char*, const Array&) { return Device::cuda; }

}  // namespace lowbitcore::python

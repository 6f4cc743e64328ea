#include "check.h"
#include "views.h"

namespace lowbitcore::python {

Device device_of(const char* op, const char* argument, const Array& array) {
  switch (array.device_type()) {
    case nb::device::cpu::value:
      return Device::cpu;
    case nb::device::cuda::value:
      return Device::cuda;
    default:
      check::fail(op, argument, "a tensor on the CPU or on CUDA", "one on another device");
  }
}

}  // namespace lowbitcore::python

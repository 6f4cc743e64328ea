#include <lowbitcore/runtime.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

namespace lowbitcore::python {

void init_runtime(nanobind::module_& m) {
  m.def("available_isas", &available_isas);
  m.def("isa", &isa);
  m.def("set_isa", &set_isa);
  m.def("set_num_threads", &set_num_threads);
  m.def("get_num_threads", &get_num_threads);
  m.def("cuda_status", &cuda_status);
  m.def("cuda_why_not", &cuda_why_not);
  m.def("cuda_has_wgmma", &cuda_has_wgmma);
  m.def("version", &version);
}

}  // namespace lowbitcore::python

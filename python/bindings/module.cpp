// The extension module. One init function per topic, no logic.
#include <lowbitcore/types.h>
#include <nanobind/nanobind.h>

namespace lowbitcore::python {

void init_decode(nanobind::module_& m);
void init_ops(nanobind::module_& m);
void init_runtime(nanobind::module_& m);

}  // namespace lowbitcore::python

NB_MODULE(_C, m) {
  nanobind::exception<lowbitcore::Error>(m, "Error", PyExc_RuntimeError);
  lowbitcore::python::init_decode(m);
  lowbitcore::python::init_ops(m);
  lowbitcore::python::init_runtime(m);
}

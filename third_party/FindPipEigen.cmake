# Eigen 3 from the system, or from the cmeel-eigen wheel of the Python that runs the build (the wheel
# keeps its CMake package where find_package does not look). Defines Eigen3::Eigen.
find_package(Eigen3 3.4 QUIET NO_MODULE)
if(NOT TARGET Eigen3::Eigen)
  find_package(Python 3.8 QUIET COMPONENTS Interpreter)
  if(Python_Interpreter_FOUND)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c
        "from importlib.metadata import distribution as d; print(d('cmeel-eigen').locate_file('cmeel.prefix'))"
      OUTPUT_VARIABLE _prefix OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    find_package(Eigen3 3.4 QUIET NO_MODULE PATHS "${_prefix}" NO_DEFAULT_PATH)
  endif()
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(PipEigen
  REASON_FAILURE_MESSAGE "install libeigen3-dev (Debian) or cmeel-eigen (pip)"
  REQUIRED_VARS Eigen3_DIR)

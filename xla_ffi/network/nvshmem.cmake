# The network between nodes, a library of its own: jax_ep/nvshmem.py loads it where it is wanted.
#
# NVSHMEM's device part is linked into it, its host part is not: that is found by its soname when
# this is loaded, in the copy that the process has already, or in the package beside this one.
# Nothing of NVSHMEM is installed with jax_ep. A library built with one version runs with that one
# and later ones of the same major version, so it is built with the oldest that is supported.
if(NOT JAX_EP_NVSHMEM MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "jax_ep: JAX_EP_NVSHMEM must be AUTO, ON or OFF; got '${JAX_EP_NVSHMEM}'")
endif()
set(jax_ep_nvshmem_dir "${JAX_EP_NVSHMEM_DIR}")
if(NOT jax_ep_nvshmem_dir)
  query_python(jax_ep_nvshmem_dir
"import importlib.util as u
try:
  spec = u.find_spec('nvidia.nvshmem')
except ModuleNotFoundError:
  spec = None
print(list(spec.submodule_search_locations)[0] if spec else '')")
endif()
set(jax_ep_has_nvshmem OFF)
if(NOT JAX_EP_NVSHMEM STREQUAL "OFF")
  if(EXISTS "${jax_ep_nvshmem_dir}/include/nvshmem.h"
     AND EXISTS "${jax_ep_nvshmem_dir}/lib/libnvshmem_device.a"
     AND EXISTS "${jax_ep_nvshmem_dir}/lib/libnvshmem_host.so.3")
    set(jax_ep_has_nvshmem ON)
  elseif(JAX_EP_NVSHMEM STREQUAL "ON")
    message(FATAL_ERROR
      "jax_ep: JAX_EP_NVSHMEM=ON, but NVSHMEM was not found in '${jax_ep_nvshmem_dir}'. Install "
      "nvidia-nvshmem-cu13 where the build's Python finds it, or set JAX_EP_NVSHMEM_DIR to a folder "
      "with its include/ and lib/")
  endif()
endif()
message(STATUS "jax_ep: network (NVSHMEM): ${jax_ep_has_nvshmem} ${jax_ep_nvshmem_dir}")
if(NOT jax_ep_has_nvshmem)
  return()
endif()

# Kernels over NVSHMEM: device code that is linked once more, with NVSHMEM's, where it is used.
add_library(jax_ep_nvshmem STATIC
  cuda/network/nvshmem_kernels.cu
  cuda/network/nvshmem_slots.cu
  xla_ffi/memory/driver.cc
  xla_ffi/network/exit_guard.cc
  xla_ffi/network/nvshmem.cc)
set_target_properties(jax_ep_nvshmem PROPERTIES
  CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON POSITION_INDEPENDENT_CODE ON
  CUDA_SEPARABLE_COMPILATION ON CUDA_VISIBILITY_PRESET hidden)
target_include_directories(jax_ep_nvshmem PUBLIC "${CMAKE_CURRENT_SOURCE_DIR}")
target_include_directories(jax_ep_nvshmem SYSTEM PUBLIC "${jax_ep_nvshmem_dir}/include")
target_compile_options(jax_ep_nvshmem PRIVATE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra> $<$<COMPILE_LANGUAGE:CUDA>:-fmad=false>)
if(JAX_EP_TIMELINE)
  target_compile_definitions(jax_ep_nvshmem PUBLIC JAX_EP_TIMELINE)  # it is in control memory
endif()
target_link_libraries(jax_ep_nvshmem PUBLIC
  "${jax_ep_nvshmem_dir}/lib/libnvshmem_device.a"
  "${jax_ep_nvshmem_dir}/lib/libnvshmem_host.so.3"
  CUDA::cudart_static)

nanobind_add_module(_nvshmem NB_STATIC STABLE_ABI xla_ffi/network/module.cc)
target_compile_options(_nvshmem PRIVATE -Wall -Wextra)
target_link_libraries(_nvshmem PRIVATE jax_ep_nvshmem)
set_target_properties(_nvshmem PROPERTIES
  CUDA_RESOLVE_DEVICE_SYMBOLS ON CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}"
  # No path of the machine that builds: jax_ep/nvshmem.py loads the library before.
  BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN/../nvidia/nvshmem/lib")
install(TARGETS _nvshmem LIBRARY DESTINATION jax_ep)

if(JAX_EP_TESTS)
  # Built by name where it can run: nearly all of it network_simulated has, too.
  add_executable(network_nvshmem EXCLUDE_FROM_ALL tests/native/network_nvshmem.cu)
  set_target_properties(network_nvshmem PROPERTIES
    CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_SEPARABLE_COMPILATION ON
    CUDA_RESOLVE_DEVICE_SYMBOLS ON
    BUILD_RPATH "${jax_ep_nvshmem_dir}/lib")
  target_compile_options(network_nvshmem PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)
  target_link_libraries(network_nvshmem PRIVATE jax_ep_nvshmem)
  include(tests/native/wire/wire.cmake)
endif()

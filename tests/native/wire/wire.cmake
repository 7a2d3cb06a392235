# The network in software (wire.h), by the names of the libraries in whose place it is loaded: all in the
# folder wire/ of the build. Built by name where UCX's headers are.
set(JAX_EP_UCX_DIR "" CACHE PATH "UCX's include folder's parent; empty: that of the package libucx-cu13")
set(ucx_dir "${JAX_EP_UCX_DIR}")
if(NOT ucx_dir)
  query_python(ucx_dir
"import importlib.util as u
spec = u.find_spec('libucx')
print(list(spec.submodule_search_locations)[0] if spec else '')")
endif()
if(NOT EXISTS "${ucx_dir}/include/ucp/api/ucp.h")
  return()
endif()
add_library(wire SHARED EXCLUDE_FROM_ALL
  tests/native/wire/driver.cc tests/native/wire/ucp.cc tests/native/wire/wire.cc)
set_target_properties(wire PROPERTIES OUTPUT_NAME ucp SOVERSION 0)
target_include_directories(wire SYSTEM PRIVATE "${ucx_dir}/include")
target_include_directories(wire PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}")
target_link_libraries(wire PRIVATE CUDA::toolkit ${CMAKE_DL_LIBS})
set(stubs)
foreach(stub "ibverbs 1" "gdrapi 2" "ucs 0")
  separate_arguments(stub)
  list(POP_FRONT stub name version)
  add_library(stub_${name} SHARED EXCLUDE_FROM_ALL tests/native/wire/stubs.cc)
  set_target_properties(stub_${name} PROPERTIES OUTPUT_NAME ${name} SOVERSION ${version})
  list(APPEND stubs stub_${name})
endforeach()
foreach(library wire ${stubs})
  set_target_properties(${library} PROPERTIES
    CXX_STANDARD 17 CXX_VISIBILITY_PRESET default LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/wire")
  target_compile_options(${library} PRIVATE -Wall -Wextra)
endforeach()
add_custom_target(network_wire DEPENDS network_nvshmem wire ${stubs})

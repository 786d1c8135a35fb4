# find_package(kiln): the target kiln::kiln, wherever this folder lies. Of an installed wheel: -Dkiln_DIR="$(python -c 'import kiln; print(kiln.__path__[0])')/lib/cmake/kiln".
get_filename_component(_kiln "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
if(NOT TARGET kiln::kiln)
  add_library(kiln::kiln SHARED IMPORTED)
  set_target_properties(kiln::kiln PROPERTIES IMPORTED_LOCATION "${_kiln}/lib/libkiln.so" INTERFACE_INCLUDE_DIRECTORIES "${_kiln}/include")
endif()
unset(_kiln)

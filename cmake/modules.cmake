# add_module(NAME SRCS a.cc ... DEPS x ...): a static library; one a folder.
function(add_module name)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  add_library(${name} STATIC ${ARG_SRCS})
  target_link_libraries(${name} PUBLIC ${ARG_DEPS})
endfunction()

# `programs`: what a user runs, without the tests.
add_custom_target(programs)

# add_program(NAME SRCS main.cc DEPS x ...): an executable in build/bin.
function(add_program name)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SRCS})
  target_link_libraries(${name} PRIVATE ${ARG_DEPS})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
  add_dependencies(programs ${name})
endfunction()

# add_module_test(NAME SRCS x_test.cc DEPS y ...): a GoogleTest program, one CTest test. Tests may read
# SLUICE_TESTDATA (a folder) and run from the build folder.
function(add_module_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SRCS;DEPS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  add_executable(${name} ${ARG_SRCS})
  target_link_libraries(${name} PRIVATE ${ARG_DEPS} GTest::gmock GTest::gtest_main)
  target_compile_definitions(${name} PRIVATE SLUICE_TESTDATA="${PROJECT_SOURCE_DIR}/tests/testdata")
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT})
  label_thread_test(${name})
endfunction()

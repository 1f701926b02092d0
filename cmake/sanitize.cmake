# SLUICE_SANITIZE=address: AddressSanitizer and UndefinedBehaviorSanitizer in everything, SLUICE_SANITIZE=thread: ThreadSanitizer. `./dev sanitize`
# uses a build folder of its own for each. The first report ends the test that made it.
set(SLUICE_SANITIZE "" CACHE STRING "address (with undefined), thread, or empty: none")
set_property(CACHE SLUICE_SANITIZE PROPERTY STRINGS "" address thread)

if(SLUICE_SANITIZE STREQUAL address)
  set(sanitizers -fsanitize=address,undefined -fno-sanitize-recover=all)
elseif(SLUICE_SANITIZE STREQUAL thread)
  set(sanitizers -fsanitize=thread)
elseif(SLUICE_SANITIZE)
  message(FATAL_ERROR "SLUICE_SANITIZE=${SLUICE_SANITIZE}: write address or thread")
endif()
if(SLUICE_SANITIZE)
  # No build type of CMake's: SLUICE_CHECK and assert stay on, -O1 keeps stacks whole, -g1 gives lines.
  set(CMAKE_BUILD_TYPE Sanitize)
  add_compile_options(-O1 -g1 -fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS ${sanitizers})
  add_link_options(${sanitizers})
endif()

# Tests for ThreadSanitizer: what has threads, and the state machines that threads share. `thread_tests` builds them, label `thread` runs them.
# Debian's gRPC and Abseil are not instrumented: a test that runs gRPC gets suppressions, which hide what has a frame of gRPC in its stack.
set(SLUICE_THREAD_TESTS
    controller_block_allocator_test controller_stop_matcher_test controller_scheduler_test controller_scheduler_simulation_test
    controller_live_request_test controller_coordinator_test controller_loop_test frame_guard_test
    step_loop_test metrics_test engine_test engine_step_test engine_sampling_test
    engine_allocation_test golden_test kv_cache_test sequence_table_test step_checker_test cpu_attention_test cpu_matmul_test cpu_norm_test
    cpu_thread_pool_test shard_source_test memory_budget_test)
set(SLUICE_THREAD_GRPC_TESTS
    rpc_test controller_generation_service_test controller_metrics_test stage_service_test worker_test shard_fetcher_test weights_service_test)
add_custom_target(thread_tests)

# Called by add_module_test for each test.
function(label_thread_test name)
  if(NOT name IN_LIST SLUICE_THREAD_TESTS AND NOT name IN_LIST SLUICE_THREAD_GRPC_TESTS)
    return()
  endif()
  add_dependencies(thread_tests ${name})
  set_tests_properties(${name} PROPERTIES LABELS thread)
  if(name IN_LIST SLUICE_THREAD_GRPC_TESTS AND SLUICE_SANITIZE STREQUAL thread)
    set_tests_properties(${name} PROPERTIES ENVIRONMENT
                         "TSAN_OPTIONS=halt_on_error=1:suppressions=${PROJECT_SOURCE_DIR}/tests/sanitize/thread.supp")
  endif()
endfunction()

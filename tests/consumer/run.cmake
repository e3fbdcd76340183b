# cmake -DSOURCE=... -DBUILD=... -DWORK=... [-DSHARED=ON] -P run.cmake
# Installs the core to a fresh prefix and builds and runs the consumer against it. The static library is that of BUILD;
# the shared one is built here, without SIMD, since its symbols are what matters.
file(REMOVE_RECURSE "${WORK}")
if(SHARED)
  set(BUILD "${WORK}/core")
  execute_process(COMMAND_ERROR_IS_FATAL ANY COMMAND "${CMAKE_COMMAND}" -S "${SOURCE}" -B "${BUILD}" -G Ninja
    -DBUILD_SHARED_LIBS=ON -DQUANTRATURE_SIMD=OFF)
  execute_process(COMMAND_ERROR_IS_FATAL ANY COMMAND "${CMAKE_COMMAND}" --build "${BUILD}")
endif()
execute_process(COMMAND_ERROR_IS_FATAL ANY
  COMMAND "${CMAKE_COMMAND}" --install "${BUILD}" --prefix "${WORK}/prefix" --component core)
execute_process(COMMAND_ERROR_IS_FATAL ANY COMMAND "${CMAKE_COMMAND}" -S "${SOURCE}/tests/consumer"
  -B "${WORK}/consumer" -G Ninja "-DCMAKE_PREFIX_PATH=${WORK}/prefix")
execute_process(COMMAND_ERROR_IS_FATAL ANY COMMAND "${CMAKE_COMMAND}" --build "${WORK}/consumer")
foreach(program IN ITEMS consumer_c consumer_cc)
  execute_process(COMMAND_ERROR_IS_FATAL ANY COMMAND "${WORK}/consumer/${program}")
endforeach()

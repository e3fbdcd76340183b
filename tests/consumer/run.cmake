# cmake -DSOURCE=... -DBUILD=... -DWORK=... [-DSHARED=ON] -P run.cmake
# Installs the core to a fresh prefix and builds and runs the consumer against it. The static library is that of BUILD;
# the shared one is built here as an embedder would, by the installation itself, without SIMD, since its symbols are what
# matters.
file(REMOVE_RECURSE "${WORK}")
if(SHARED)
  set(BUILD "${WORK}/core")
  execute_process(COMMAND_ERROR_IS_FATAL ANY COMMAND "${CMAKE_COMMAND}" -S "${SOURCE}" -B "${BUILD}" -G Ninja
    -DQUANTRATURE_PYTHON=OFF -DBUILD_SHARED_LIBS=ON -DQUANTRATURE_SIMD=OFF)
else()
  set(component --component core) # BUILD may have a Python extension, too
endif()
execute_process(COMMAND_ERROR_IS_FATAL ANY
  COMMAND "${CMAKE_COMMAND}" --install "${BUILD}" --prefix "${WORK}/prefix" ${component})
execute_process(COMMAND_ERROR_IS_FATAL ANY COMMAND "${CMAKE_COMMAND}" -S "${SOURCE}/tests/consumer"
  -B "${WORK}/consumer" -G Ninja "-DCMAKE_PREFIX_PATH=${WORK}/prefix")
execute_process(COMMAND_ERROR_IS_FATAL ANY COMMAND "${CMAKE_COMMAND}" --build "${WORK}/consumer")
foreach(program IN ITEMS consumer_c consumer_cc)
  execute_process(COMMAND_ERROR_IS_FATAL ANY COMMAND "${WORK}/consumer/${program}")
endforeach()

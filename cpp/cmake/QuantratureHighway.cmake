# Defines the target quantrature_highway when Google Highway can be had: its sources in cpp/highway.tar.gz (sdists
# have them), else installed (Debian: libhwy-dev), else downloaded; without any of them every kernel runs as its
# reference, and a status line says so. Built from sources it is linked statically.
if(NOT QUANTRATURE_SIMD)
  message(STATUS "quantrature: SIMD off (QUANTRATURE_SIMD=OFF), the reference kernels run")
  return()
endif()
include(fetch_highway)

set(highway_archive "${PROJECT_SOURCE_DIR}/cpp/highway.tar.gz")
if(FETCHCONTENT_SOURCE_DIR_HIGHWAY)
  set(highway_origin "${FETCHCONTENT_SOURCE_DIR_HIGHWAY}")
elseif(EXISTS "${highway_archive}")
  check_highway("${highway_archive}")
  set(highway_origin "from ${highway_archive}")
else()
  find_package(hwy 1.0.3 CONFIG QUIET)
  if(TARGET hwy::hwy)
    set(highway_target hwy::hwy)
    set(highway_origin "installed ${hwy_VERSION}")
  else()
    set(highway_archive "${CMAKE_BINARY_DIR}/highway.tar.gz")
    if(EXISTS "${highway_archive}")
      check_highway("${highway_archive}")
    else()
      fetch_highway("${highway_archive}")
    endif()
    if(highway_failure)
      message(STATUS "quantrature: SIMD off, Google Highway is not installed (Debian: libhwy-dev) and could not be "
        "downloaded (${highway_failure}); the reference kernels run, many times slower")
      return()
    endif()
    set(highway_origin "downloaded")
  endif()
endif()

if(NOT highway_target)
  include(FetchContent)
  set(HWY_ENABLE_CONTRIB OFF CACHE BOOL "" FORCE)
  set(HWY_ENABLE_EXAMPLES OFF CACHE BOOL "" FORCE)
  set(HWY_ENABLE_INSTALL ON CACHE BOOL "" FORCE) # beside a static core, which needs it
  set(HWY_ENABLE_TESTS OFF CACHE BOOL "" FORCE)
  set(HWY_FORCE_STATIC_LIBS ON CACHE BOOL "" FORCE)
  FetchContent_Declare(highway URL "${highway_archive}" URL_HASH SHA256=${highway_sha256}
    DOWNLOAD_EXTRACT_TIMESTAMP ON)
  FetchContent_MakeAvailable(highway)
  set_target_properties(hwy PROPERTIES
    POSITION_INDEPENDENT_CODE ON
    CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON)
  set(highway_target hwy)
endif()

add_library(quantrature_highway INTERFACE)
target_link_libraries(quantrature_highway INTERFACE ${highway_target})
# Vectors of SVE have no size when they are compiled, and kernels keep arrays of vectors: there NEON runs.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)")
  target_compile_definitions(quantrature_highway INTERFACE
    "HWY_DISABLED_TARGETS=(HWY_SVE|HWY_SVE2|HWY_SVE_256|HWY_SVE2_128)")
else()
  # Processors without AVX2, of 2012 and before, get the baseline: a set of kernels more for them costs every build of
  # the package a third of its time.
  set(disabled "HWY_SSSE3|HWY_SSE4")
  if(QUANTRATURE_SANITIZE) # vector code is slow to compile with sanitizers
    string(APPEND disabled "|HWY_AVX3_DL")
  endif()
  target_compile_definitions(quantrature_highway INTERFACE "HWY_DISABLED_TARGETS=(${disabled})")
endif()
message(STATUS "quantrature: SIMD on, Google Highway ${highway_origin}")

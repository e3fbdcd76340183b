# Defines the target quantrature_highway when Google Highway can be had: installed (Debian: libhwy-dev), else
# downloaded by hash; without either every kernel runs as its reference, and a status line says so.
if(NOT QUANTRATURE_SIMD)
  message(STATUS "quantrature: SIMD off (QUANTRATURE_SIMD=OFF), the reference kernels run")
  return()
endif()

find_package(hwy 1.0.3 CONFIG QUIET)
if(TARGET hwy::hwy)
  set(highway_target hwy::hwy)
  set(highway_origin "installed ${hwy_VERSION}")
elseif(FETCHCONTENT_SOURCE_DIR_HIGHWAY)
  set(highway_origin "${FETCHCONTENT_SOURCE_DIR_HIGHWAY}")
else()
  set(highway_archive "${CMAKE_BINARY_DIR}/highway-1.2.0.tar.gz")
  set(highway_sha256 7e0be78b8318e8bdbf6fa545d2ecb4c90f947df03f7aadc42c1967f019e63343)
  if(NOT EXISTS "${highway_archive}")
    file(DOWNLOAD https://github.com/google/highway/archive/refs/tags/1.2.0.tar.gz "${highway_archive}.part"
      STATUS highway_status TIMEOUT 60)
    list(GET highway_status 0 highway_code)
    if(highway_code EQUAL 0)
      file(RENAME "${highway_archive}.part" "${highway_archive}")
    else()
      list(GET highway_status 1 highway_reason)
      message(STATUS "quantrature: SIMD off, Google Highway is not installed (Debian: libhwy-dev) and could not be "
        "downloaded (${highway_reason}); the reference kernels run, many times slower")
      return()
    endif()
  endif()
  set(highway_origin "downloaded 1.2.0")
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
  set_target_properties(hwy PROPERTIES POSITION_INDEPENDENT_CODE ON)
  set(highway_target hwy)
endif()

add_library(quantrature_highway INTERFACE)
target_link_libraries(quantrature_highway INTERFACE ${highway_target})
message(STATUS "quantrature: SIMD on, Google Highway ${highway_origin}")

# Downloads the sources of Google Highway, from the first place that has them:
#   cmake -DDESTINATION=cpp/highway.tar.gz -P cpp/cmake/fetch_highway.cmake
# makes a tree (and the sdist of it) that builds without a network and without an installed Highway.
# Sets highway_failure, or highway_sha256 to that of the file; as a script it fails.
set(highway_versions
  "7e0be78b8318e8bdbf6fa545d2ecb4c90f947df03f7aadc42c1967f019e63343"  # 1.2.0
  "566fc77315878473d9a6bd815f7de78c73734acdcb745c3dde8579560ac5440e") # 1.0.3
set(highway_places
  "https://github.com/google/highway/archive/refs/tags/1.2.0.tar.gz"
  "http://deb.debian.org/debian/pool/main/h/highway/highway_1.0.3.orig.tar.gz")

function(check_highway file)
  file(SHA256 "${file}" hash)
  if(NOT hash IN_LIST highway_versions)
    message(FATAL_ERROR "quantrature: ${file} is no version of Google Highway that is known here (SHA256 ${hash})")
  endif()
  set(highway_sha256 ${hash} PARENT_SCOPE)
endfunction()

function(fetch_highway file)
  set(reasons)
  foreach(place IN LISTS highway_places)
    file(DOWNLOAD "${place}" "${file}.part" STATUS status TIMEOUT 60)
    list(GET status 0 code)
    if(code EQUAL 0)
      file(RENAME "${file}.part" "${file}")
      check_highway("${file}")
      set(highway_sha256 ${highway_sha256} PARENT_SCOPE)
      set(highway_failure "" PARENT_SCOPE)
      return()
    endif()
    list(GET status 1 reason)
    list(APPEND reasons "${place}: ${reason}")
  endforeach()
  file(REMOVE "${file}.part")
  list(JOIN reasons ", " reasons)
  set(highway_failure "${reasons}" PARENT_SCOPE)
endfunction()

if(CMAKE_SCRIPT_MODE_FILE STREQUAL CMAKE_CURRENT_LIST_FILE)
  if(EXISTS "${DESTINATION}")
    check_highway("${DESTINATION}")
    return()
  endif()
  fetch_highway("${DESTINATION}")
  if(highway_failure)
    message(FATAL_ERROR "quantrature: cannot download Google Highway (${highway_failure})")
  endif()
endif()

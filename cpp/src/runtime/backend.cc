#include "runtime/backend.hpp"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <string>

#include "common/check.hpp"
#include "quantrature/device.hpp"
#include "quantrature/runtime.hpp"

namespace quantrature {
namespace {

constexpr const char* kFile = "libquantrature_cuda.so";

std::string folder_of_this_library() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&folder_of_this_library), &info) == 0 || info.dli_fname == nullptr)
    return "";
  const std::string file = info.dli_fname;
  const size_t slash = file.rfind('/');
  return slash == std::string::npos ? "" : file.substr(0, slash);
}

struct Loaded {
  const qtr_backend* backend = nullptr;
  int devices = 0;
  std::string why_not;
};

// The libraries stay open: what they registered with the driver must not go away before it does.
Loaded load() {
  Loaded r;
  const char* forced = std::getenv("QUANTRATURE_CUDA_PLUGIN");
  void* library = nullptr;
  const auto open = [&](const std::string& file) {
    library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) r.why_not = dlerror();
    return library != nullptr;
  };
  if (forced != nullptr && *forced != '\0') {
    open(forced);
  } else {
    const std::string beside = folder_of_this_library() + "/" + kFile;
    if (access(beside.c_str(), R_OK) == 0)
      open(beside);
    else if (!open(kFile))
      r.why_not = std::string("this installation has no ") + kFile;
  }
  if (library == nullptr) return r;
  const auto query = reinterpret_cast<qtr_backend_query_function>(dlsym(library, "qtr_backend_query"));
  const qtr_backend* backend = query == nullptr ? nullptr : query(QTR_BACKEND_ABI);
  if (backend == nullptr || backend->abi != QTR_BACKEND_ABI) {
    r.why_not = "the CUDA backend that was found is of another version of quantrature";
    return r;
  }
  if (backend->version == nullptr || std::string(backend->version) != version()) {
    r.why_not = complaint("the CUDA backend must be of this version of quantrature", "version",
                          backend->version == nullptr ? "none" : backend->version, "expected", version());
    return r;
  }
  qtr_failure why{};
  r.devices = backend->device_count(&why);
  if (r.devices > 0)
    r.backend = backend;
  else
    r.why_not = why.message;
  return r;
}

const Loaded& loaded() {
  static const Loaded once = load();
  return once;
}

}  // namespace

int cuda_device_count(std::string* why_not) {
  try {
    if (why_not != nullptr) *why_not = loaded().why_not;
    return loaded().devices;
  } catch (...) {
    return 0;
  }
}

const qtr_backend& backend_of(const qtr_device& device, const char* op) {
  const std::string at = std::string("[") + op + "] ";
  check(device.kind == QTR_CUDA, (at + "device must be the CPU or a CUDA device").c_str(), "kind",
        static_cast<int>(device.kind));
  const Loaded& found = loaded();
  if (found.backend == nullptr) throw Unsupported(at + "CUDA is not available here: " + found.why_not);
  check(device.ordinal >= 0 && device.ordinal < found.devices,
        (at + "device must be one that there is").c_str(), "ordinal", device.ordinal, "devices",
        found.devices);
  return *found.backend;
}

void raise(qtr_status status, const qtr_failure& failure) {
  switch (status) {
    case QTR_OK:
      return;
    case QTR_INVALID_ARGUMENT:
      throw InvalidArgument(failure.message);
    case QTR_UNSUPPORTED:
      throw Unsupported(failure.message);
    default:
      throw DeviceError(failure.message);
  }
}

}  // namespace quantrature

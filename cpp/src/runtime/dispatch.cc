#include "runtime/dispatch.hpp"

#include <atomic>
#include <cstdlib>

#include "common/check.hpp"
#include "quantrature/runtime.hpp"
#include "runtime/reference.hpp"
#include "runtime/simd_targets.hpp"

namespace quantrature {
namespace {

std::vector<Target> all_targets() {
  Target reference{"reference", {}};
#define QUANTRATURE_OP(op) reference::fill_##op(reference.kernels);
#define QUANTRATURE_KERNEL(name, ...)
#include "runtime/kernels.inc"
#undef QUANTRATURE_KERNEL
#undef QUANTRATURE_OP
  std::vector<Target> targets{reference};
#ifdef QUANTRATURE_HAVE_SIMD
  for (const Target& target : simd_targets(reference.kernels)) targets.push_back(target);
#endif
  return targets;
}

const std::vector<Target>& targets() {
  static const std::vector<Target> found = all_targets();
  return found;
}

const Target& find(const std::string& name, const char* asked_by) {
  std::string known;
  for (const Target& target : targets()) {
    if (target.name == name) return target;
    known += (known.empty() ? "" : ", ") + target.name;
  }
  throw InvalidArgument(
      complaint("[target] this CPU and build have no such kernel set", asked_by, name, "known", known));
}

std::atomic<const Target*>& current() {
  static std::atomic<const Target*> chosen = [] {
    const char* forced = std::getenv("QUANTRATURE_TARGET");
    return forced != nullptr && *forced != '\0' ? &find(forced, "QUANTRATURE_TARGET") : &targets().back();
  }();
  return chosen;
}

}  // namespace

const KernelTable& kernels() {
  return current().load(std::memory_order_relaxed)->kernels;
}

std::vector<std::string> available_targets() {
  std::vector<std::string> names;
  for (const Target& target : targets()) names.push_back(target.name);
  return names;
}

std::string target() {
  return current().load()->name;
}

void set_target(const std::string& name) {
  const Target& chosen = find(name, "name");
  current().store(&chosen);
}

const char* version() {
  return QUANTRATURE_VERSION;
}

}  // namespace quantrature

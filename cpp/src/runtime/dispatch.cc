#include "runtime/dispatch.hpp"

#include <atomic>
#include <cstdlib>

#include "common/check.hpp"
#include "quantrature/runtime.hpp"
#include "runtime/log.hpp"
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

void tell(const Target& chosen) {
  if (logs(QTR_LOG_INFO)) log(QTR_LOG_INFO, ("[target] kernels of the set " + chosen.name + " run").c_str());
}

std::atomic<const Target*>& current() {
  static std::atomic<const Target*> chosen = [] {
    const char* forced = std::getenv("QUANTRATURE_TARGET");
    const bool free = forced == nullptr || *forced == '\0';
    const Target& target = free ? targets().back() : find(forced, "QUANTRATURE_TARGET");
    tell(target);
    if (free && targets().size() == 1)
      log(QTR_LOG_WARNING,
          "[target] this build has the reference kernels alone, which are many times slower");
    return &target;
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
  tell(chosen);
}

const char* version() {
  return QUANTRATURE_VERSION;
}

}  // namespace quantrature

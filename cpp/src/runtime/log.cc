#include "runtime/log.hpp"

#include <atomic>
#include <mutex>

#include "common/check.hpp"
#include "quantrature/runtime.hpp"

namespace quantrature {
namespace {

constexpr int kNobody = QTR_LOG_ERROR + 1;

std::mutex mutex;
std::atomic<int> least{kNobody};  // levels below are not passed on
LogHook current{};

}  // namespace

void set_log_hook(const LogHook* hook) {
  if (hook != nullptr) {
    check_given(hook->write != nullptr, "set_log_hook", "write");
    check(hook->level >= QTR_LOG_DEBUG && hook->level <= QTR_LOG_ERROR,
          "[set_log_hook] level must be QTR_LOG_DEBUG to QTR_LOG_ERROR", "level",
          static_cast<int>(hook->level));
  }
  std::lock_guard lock(mutex);
  current = hook != nullptr ? *hook : LogHook{};
  least = hook != nullptr ? static_cast<int>(hook->level) : kNobody;
}

bool logs(qtr_log_level level) noexcept {
  return static_cast<int>(level) >= least.load(std::memory_order_relaxed);
}

void log(qtr_log_level level, const char* message) noexcept {
  if (!logs(level)) return;
  std::lock_guard lock(mutex);
  if (logs(level)) current.write(current.context, level, message);
}

}  // namespace quantrature

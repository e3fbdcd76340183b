// The reader of a trellis, for kernels.
#pragma once

#include "launch.cuh"
#include "ops/trellis/codes.hpp"

namespace quantrature::cuda {

// A reader whose table is on the device.
class DeviceTrellis {
 public:
  DeviceTrellis(const qtr_trellis& trellis, cudaStream_t stream)
      : reader_(trellis_reader_of(trellis)), pairs_(reader_.code == QTR_HYB ? kHybEntries : 0, stream) {
    if (reader_.code != QTR_HYB) return;
    pairs_.write(reader_.hyb_pairs, kHybEntries);
    reader_.hyb_pairs = pairs_.get();
  }
  const TrellisReader& get() const { return reader_; }
  float factor(float scale) const { return static_cast<float>(static_cast<double>(scale) / reader_.rms); }

 private:
  TrellisReader reader_;
  Scratch<uint32_t> pairs_;
};

}  // namespace quantrature::cuda

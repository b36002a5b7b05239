// The device code of the hash, compiled for the host: a team is a loop over its lanes, a launch two threads that share
// its teams.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "hash/batch.h"
#include "hash/sources.h"
#include "hash/team.h"

namespace torchcache::hash {

class LoopTeam {
 public:
  LoopTeam() {
    for (int i = 0; i < kLanes; ++i) lanes_[i] = Lane(i);
  }

  template <class F>
  void each(const F& f) {
    for (Lane& lane : lanes_) f(lane);
  }
  void exchange() {
    for (Lane& lane : lanes_) lane.value += lanes_[lane.index ^ 1].sum;
    for (Lane& lane : lanes_) lane.sum = 0;
  }
  void collect(uint64_t values[kLanes]) const {
    for (const Lane& lane : lanes_) values[lane.index] = lane.value;
  }
  static bool writes() { return true; }
  static void settle() {}
  static bool last(uint32_t* counter, int64_t n) { return __atomic_add_fetch(counter, 1, __ATOMIC_ACQ_REL) == n; }

 private:
  Lane lanes_[kLanes];
};

struct Shape {
  int64_t blocks;  // 0: as many as a launch on a device has
  int threads;
  uint32_t seed;  // of the order in which the teams come

  int64_t blocks_of(const Batch& batch) const { return blocks > 0 ? blocks : blocks_for(batch.messages(), threads); }
};

template <class Source>
void run(const Batch& batch, Shape shape) {
  const int64_t blocks = shape.blocks_of(batch);
  std::vector<int64_t> order(blocks * shape.threads);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(shape.seed));
  const auto work = [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      const TeamPosition place =
          team_position(order[i] / shape.threads, static_cast<int>(order[i] % shape.threads), blocks, shape.threads);
      if (place.lane != 0) continue;  // the loop over lanes stands for all eight
      LoopTeam team;
      digest_batch<Source>(team, batch, place.first, place.step);
    }
  };
  if (batch.messages() < 2) return work(0, order.size());
  std::thread other(work, 0, order.size() / 2);
  work(order.size() / 2, order.size());
  other.join();
}

inline void launch(const Batch& batch, Shape shape) {
  if (batch.done != nullptr) std::fill_n(batch.done, batch.rows.count, 0);
  with_source(batch.rows, [&](auto source) { run<typename decltype(source)::type>(batch, shape); });
}

}  // namespace torchcache::hash

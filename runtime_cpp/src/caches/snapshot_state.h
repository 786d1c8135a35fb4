#pragma once
#include <memory>
#include <vector>

#include "caches/caches.h"

namespace kiln {

struct Snapshot::State {
  std::shared_ptr<const Model> model;
  Lineage past;
  Mark mark;
  int64_t written = 0;  // how far the rings had been written; beyond the position where tokens were forgotten
  bool whole = false;
  int64_t next = -1;
  bool handed_out = false;
  std::vector<float> logits;      // of the last position; empty: nobody had them
  Tensor copies;                  // uint8: of the rings, then of the others if whole, in the manifest's order
  std::weak_ptr<Caches> source;   // whose row has the others
};

}  // namespace kiln

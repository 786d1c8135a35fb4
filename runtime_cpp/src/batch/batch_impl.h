#pragma once
#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "batch/drafts.h"
#include "batch/entries.h"
#include "batch/rows.h"
#include "kiln/batch.h"
#include "model/model_impl.h"

namespace kiln {

// Timelines that join, take steps together and leave. Everything but the constructor and the destructor runs as a Turn of `timeline`.
struct Batch::Impl {
  Impl(std::shared_ptr<const Model> m, const BatchOptions& options);
  ~Impl();

  int64_t join(const Request& request);
  void extend(Row& row, const std::vector<int64_t>& tokens, bool by_steps);
  std::vector<RowEvent> step();

  void read_chunk(int64_t number, std::vector<RowEvent>& events);
  void take_step(const std::vector<int64_t>& numbers, std::vector<RowEvent>& events);
  void queue_ahead();
  bool take_ahead(std::vector<RowEvent>& events);
  void forget_ahead();
  RowEvent took(Row& row, int64_t token);
  void keep_logits(Row& row, const Tensor& logits, int64_t at);
  void check_tokens(const std::vector<int64_t>& tokens, int64_t after, const char* what) const;

  // A step that is queued, and whose tokens it was fed. None: nothing is.
  struct Ahead {
    struct Fed {
      int64_t number, handle, token, position;
    };
    Entries::Step* step = nullptr;
    std::vector<Fed> fed;
  };

  std::shared_ptr<const Model> model;
  const Model::Impl& shared;
  BatchOptions options;  // with the artifact's numbers where they were 0
  std::unique_ptr<Timeline> timeline;
  std::optional<Entries> entries;
  std::optional<BatchDrafts> drafts;
  std::optional<Rows> rows;
  Ahead ahead;
  int64_t last_handle = 0;
  int64_t read_last = 0;  // number of the row whose prompt a chunk was read of last
  mutable std::atomic<bool> busy{false};
};

}  // namespace kiln

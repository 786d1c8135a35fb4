#include "batch/drafts.h"

#include <algorithm>

#include "draft/drafting.h"

namespace kiln {

BatchDrafts::BatchDrafts(const Model::Impl& shared, Timeline& timeline, Entries& entries, const BatchOptions& options)
    : shared_(shared), timeline_(timeline), entries_(entries), options_(options), costs_(all_sizes(shared.artifact)) {
  counts_.tried.resize(static_cast<size_t>(costs_.sizes().back() - 1)), counts_.right = counts_.tried;
}

void BatchDrafts::open_model() {
  if (drafter_) return;
  auto opened = std::make_unique<ModelDrafter>(shared_, timeline_, entries_.surroundings(), entries_.tensors(), options_.graph, options_.early_launch);
  hidden_ = timeline_.make(Scalar::F32, {options_.rows, shared_.artifact.hidden_size()});
  drafter_ = std::move(opened);
}

void BatchDrafts::draft(Rows& rows, const std::vector<int64_t>& numbers, int64_t room) {
  std::vector<std::vector<double>> chances(numbers.size());
  std::vector<double> seconds(numbers.size());
  for (size_t i = 0; i < numbers.size(); ++i) {
    Row& row = rows[numbers[i]];
    if (!row.drafts) continue;
    row.drafts->now.clear();
    if (row.left() > 1) continue;  // what comes is given
    const int64_t length = row.request.drafting.length ? row.request.drafting.length : costs_.sizes().back() - 1;
    int64_t most = std::min({length, room, shared_.artifact.max_seq_len - row.position - 1});
    if (row.request.max_new_tokens) most = std::min(most, row.request.max_new_tokens - row.produced - 1);
    chances[i] = row.drafts->acceptance.chances();
    if (row.drafts->by_model) {
      seconds[i] = drafter_->seconds();
      chances[i].resize(row.hidden && most > 0 ? static_cast<size_t>(most) : 0);
    } else {
      row.drafts->now = row.drafts->ngram.draft(most);
      chances[i].resize(row.drafts->now.size());
    }
  }
  const std::vector<int64_t> shares = share_drafts(chances, costs_, seconds);
  for (int64_t share : shares) room -= share;
  for (size_t i = 0; i < numbers.size(); ++i) {
    Row& row = rows[numbers[i]];
    if (!row.drafts) continue;
    const int64_t offered = static_cast<int64_t>(chances[i].size()) - shares[i];
    const int64_t more = std::min(room, row.request.drafting.fixed ? offered : int64_t{!shares[i] && offered && row.drafts->acceptance.due()});
    room -= more;
    if (row.drafts->by_model && shares[i] + more > 0)
      row.drafts->now = drafter_->draft({row.token(), row.position, numbers[i], hidden_of(numbers[i]), row.request.sampling}, shares[i] + more);
    else
      row.drafts->now.resize(static_cast<size_t>(shares[i] + more));
  }
}

void BatchDrafts::keep_hidden(Row& row, int64_t number, const Tensor& lines, int64_t at) {
  if (!row.drafts || !row.drafts->by_model) return;
  timeline_.copy(hidden_of(number), line_of(lines, at));
  row.hidden = true;
}

int64_t BatchDrafts::took(Row& row, const int64_t* sampled) {
  const auto drafted = static_cast<int64_t>(row.drafts->now.size());
  const int64_t agreed = Acceptance::agreed(row.drafts->now, {sampled, sampled + drafted + 1});
  row.drafts->acceptance.took(drafted, agreed);
  for (int64_t i = 0; i < drafted && i <= agreed; ++i) ++counts_.tried[static_cast<size_t>(i)], counts_.right[static_cast<size_t>(i)] += i < agreed;
  ++counts_.steps, counts_.tokens += agreed + 1;
  return agreed;
}

}  // namespace kiln

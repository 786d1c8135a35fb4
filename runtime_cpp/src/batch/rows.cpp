#include "batch/rows.h"

#include <algorithm>

namespace kiln {

Row& Rows::at(int64_t number) {
  if (number < 0 || number >= size()) fail("row ", number, ": the batch has ", size());
  return (*this)[number];
}

// The row that the request asks for; or a free one, an empty one first, then the one whose timeline joined first.
Row& Rows::free_for(const Request& request) {
  if (request.row < 0) {
    Row* found = nullptr;
    auto age = [](const Row& r) { return std::pair(r.position > 0, r.handle); };
    for (Row& r : rows_)
      if (!r.used() && (!found || age(r) < age(*found))) found = &r;
    if (!found) fail("all ", rows_.size(), " rows of the batch are in use; wait until one leaves");
    return *found;
  }
  Row& row = at(request.row);
  if (row.used()) fail("row ", request.row, " is in use by timeline ", row.handle);
  const int64_t held = row.position;
  if (held >= static_cast<int64_t>(request.prompt.size()) || !std::equal(request.prompt.begin(), request.prompt.begin() + held, row.lineage.ids().begin()))
    fail("row ", request.row, " holds ", held, " tokens with which the prompt does not begin, or behind which none is left; rewind() it");
  return row;
}

std::vector<int64_t> Rows::in_order(bool (Row::*which)() const) const {
  std::vector<int64_t> found;
  for (int64_t i = 0; i < size(); ++i)
    if (((*this)[i].*which)()) found.push_back(i);
  std::sort(found.begin(), found.end(), [&](int64_t a, int64_t b) { return (*this)[a].handle < (*this)[b].handle; });
  return found;
}

Row& Rows::of(int64_t handle) {
  for (Row& row : rows_)
    if (row.used() && row.handle == handle) return row;
  fail("no timeline ", handle, " is in the batch: it has ended or left, or never was");
}

int64_t Rows::next_reader(int64_t last) const {
  for (int64_t i = 1; i <= size(); ++i)
    if (const int64_t number = (last + i) % size(); (*this)[number].waits()) return number;
  return size();
}

}  // namespace kiln

#include "draft/drafting.h"

namespace kiln {

DraftSource draft_source(const std::string& name) {
  if (name == "off") return DraftSource::Off;
  if (name == "ngram") return DraftSource::Ngram;
  if (name == "mtp") return DraftSource::Mtp;
  fail("drafts by '", name, "': must be ngram, mtp or off");
}

std::vector<int64_t> all_sizes(const Artifact& artifact) {
  std::vector<int64_t> sizes = artifact.steps();
  sizes.insert(sizes.begin(), 1);
  return sizes;
}

std::vector<int64_t> step_sizes(const Artifact& artifact, const Drafting& drafting) {
  std::vector<int64_t> sizes = all_sizes(artifact);
  if (sizes.size() == 1) {
    for (const KvSpec& k : artifact.kv)
      if (k.state) fail("drafts: the model has layers with a state, which takes one token after the other; leave drafts off");
    fail("drafts: the artifact has no steps of several tokens; export it with --decode-rows 1,2,4,8");
  }
  if (drafting.length < 0 || drafting.length >= sizes.back())
    fail("drafts: ", drafting.length, " a step: the artifact's largest step takes ", sizes.back(), " tokens, so 1 to ", sizes.back() - 1, " drafts, or 0 for that");
  return sizes;
}

int64_t read_by_step(const Artifact& artifact, const Timeline& timeline, int64_t asked) {
  const int64_t most = all_sizes(artifact).back();
  if (asked < 0 || asked > most) fail("read_by_step is ", asked, ": the artifact's largest step takes ", most, " tokens, so 1 to ", most, ", or 0");
  return asked ? asked : timeline.asynchronous() ? most : 1;
}

}  // namespace kiln

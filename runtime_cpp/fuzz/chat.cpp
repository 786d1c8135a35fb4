// One user turn: prefix, user and suffix between bytes 0xFF. Special tokens come from the template alone.
#include <algorithm>

#include "fuzz.h"
#include "text/utf8.h"
#include "vocabulary.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kiln;
  std::string_view parts[3], rest = fuzz::text(data, size);
  for (std::string_view& part : parts) {
    part = rest.substr(0, rest.find('\xFF'));
    rest.remove_prefix(std::min(rest.size(), part.size() + 1));
  }
  for (fuzz::Kind kind : fuzz::kKinds) {
    const fuzz::Vocabulary& v = fuzz::Vocabulary::get(kind);
    const Tokenizer& tokenizer = fuzz::Vocabulary::tokenizer(kind);
    auto specials = [&](const std::vector<int64_t>& ids) {
      return std::count_if(ids.begin(), ids.end(), [&](int64_t id) { return id < static_cast<int64_t>(v.specials.size()); });
    };
    std::vector<int64_t> ids = tokenizer.encode_chat(parts[0], parts[1], parts[2]);
    std::vector<int64_t> prefix = tokenizer.encode(parts[0], ParseSpecial::All, false), suffix = tokenizer.encode(parts[2], ParseSpecial::All, false);
    fuzz::demand(!ids.empty() && ids[0] == tokenizer.bos(), "a prompt begins with BOS");
    std::vector<int64_t> alone = tokenizer.encode_segments({{parts[0], ParseSpecial::All}, {trim(parts[1]), ParseSpecial::None}, {parts[2], ParseSpecial::All}}, false);
    bool written = !alone.empty() && alone[0] == tokenizer.bos();
    fuzz::demand(specials(ids) == specials(alone) + !written && specials(alone) <= specials(prefix) + specials(suffix), "special tokens come from the template");
    // Tokens that are cut out of any text may run on from one part to the next, and take a template's beginning with them.
    if (kind != fuzz::Kind::Scored) fuzz::demand(specials(alone) == specials(prefix) + specials(suffix), "the template's special tokens are all there");

    std::string text = written ? "" : "<bos>";
    for (std::string_view part : {parts[0], trim(parts[1]), parts[2]}) text += v.kept(part);
    if (kind != fuzz::Kind::Bytes) text = v.kept(text);
    fuzz::demand(tokenizer.decode(ids, false) == utf8_take(text, true), "the turn comes back");
  }
  return 0;
}

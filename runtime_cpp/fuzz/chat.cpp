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
  const fuzz::Vocabulary& v = fuzz::Vocabulary::get();
  const Tokenizer& tokenizer = fuzz::Vocabulary::tokenizer();
  auto specials = [&](const std::vector<int64_t>& ids) {
    return std::count_if(ids.begin(), ids.end(), [&](int64_t id) { return id < static_cast<int64_t>(v.specials.size()); });
  };
  std::vector<int64_t> ids = tokenizer.encode_chat(parts[0], parts[1], parts[2]);
  std::vector<int64_t> prefix = tokenizer.encode(parts[0], ParseSpecial::All, false), suffix = tokenizer.encode(parts[2], ParseSpecial::All, false);
  bool has_bos = !prefix.empty() && prefix[0] == tokenizer.bos();
  bool starts_with_suffix = prefix.empty() && trim(parts[1]).empty() && !suffix.empty() && suffix[0] == tokenizer.bos();
  fuzz::demand(!ids.empty() && ids[0] == tokenizer.bos(), "a prompt begins with BOS");
  fuzz::demand(specials(ids) == specials(prefix) + specials(suffix) + !(has_bos || starts_with_suffix), "special tokens come from the template");

  std::string text = std::string(has_bos || starts_with_suffix ? "" : "<bos>") + std::string(parts[0]) + std::string(trim(parts[1])) + std::string(parts[2]);
  for (size_t at = 0; (at = text.find("\xE2\x96\x81", at)) != std::string::npos;) text.replace(at, 3, " ");
  fuzz::demand(tokenizer.decode(ids, false) == utf8_take(text, true), "the turn comes back");
  return 0;
}

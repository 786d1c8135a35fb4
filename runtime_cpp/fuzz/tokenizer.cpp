// tokenizer.json: one that is accepted gives every text back, whatever its vocabulary and merges. One over bytes may lack some, and one that
// puts spaces in front of text has more of them.
#include "kiln/tokenizer.h"

#include <algorithm>

#include "fuzz.h"
#include "text/vocabulary.h"

namespace {

bool within(std::string_view few, std::string_view many) {
  size_t at = 0;
  for (char c : many) at += at < few.size() && few[at] == c;
  return at == few.size();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kiln;
  fuzz::accepts([&] {
    Tokenizer tokenizer = Tokenizer::parse(std::string(fuzz::text(data, size)), "tokenizer.json");
    auto vocabulary = Vocabulary::parse(std::string(fuzz::text(data, size)), "tokenizer.json");
    for (std::string text : {"", "a", "the cat  sat\n\non <0x41> the<bos> mat.\t", "gr\xC3\xBC\xC3\x9F" "e \xF0\x9F\xA6\x8A abababab aaaaaaaa"}) {
      for (bool bos : {false, true}) {
        std::vector<int64_t> ids = tokenizer.encode(text, ParseSpecial::None, bos);
        StreamDecoder stream(tokenizer);
        std::string streamed, raw;
        size_t start = bos && tokenizer.bos() >= 0 && !ids.empty() && ids[0] == tokenizer.bos();
        ids.erase(ids.begin(), ids.begin() + static_cast<ptrdiff_t>(start));
        for (int64_t id : ids) {
          fuzz::demand(id >= 0 && id < tokenizer.size(), "an id is in the vocabulary");
          streamed += stream.push(id);
          raw += tokenizer.piece(id);
        }
        streamed += stream.finish();
        if (vocabulary->bytewise)
          fuzz::demand(within(raw, text), "nothing but text comes back");
        else if (vocabulary->space_prefix)
          fuzz::demand(within(text, raw) && (text.empty() || raw[0] == ' '), "a text comes back, with spaces");
        else
          fuzz::demand(streamed == text && tokenizer.decode(ids) == text, "a text comes back");
      }
      for (int64_t id : tokenizer.encode(text, ParseSpecial::All)) tokenizer.piece(id, false);
    }
    for (int64_t id = 0; id < tokenizer.size(); ++id) tokenizer.decode({id}, id % 2);
    fuzz::demand(!fuzz::accepts([&] { tokenizer.piece(tokenizer.size()); }) && !fuzz::accepts([&] { tokenizer.piece(-1); }), "other ids are refused");
  });
  return 0;
}

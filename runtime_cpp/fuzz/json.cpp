// JsonDocument: what is accepted says the same when it is written and read again.
#include "kiln/json.h"

#include <cinttypes>

#include "fuzz.h"

namespace {

using kiln::Json;

std::string written(const Json& v) {
  std::string out;
  switch (v.type()) {
    case Json::Type::Null: return "null";
    case Json::Type::Bool: return v.as_bool() ? "true" : "false";
    case Json::Type::Int: return std::to_string(v.as_int());
    case Json::Type::Float: {
      std::string number = kiln::json_number(v.as_double(), "%.17g");
      return number.find_first_of(".e") == std::string::npos ? number + ".0" : number;  // else it would come back as an integer
    }
    case Json::Type::String: return kiln::json_quote(v.as_string());
    case Json::Type::Array:
      for (const Json& item : v) out += (out.empty() ? "" : ",") + written(item);
      return "[" + out + "]";
    case Json::Type::Object:
      for (size_t i = 0; i < v.size(); ++i) {
        out += (out.empty() ? "" : ",") + kiln::json_quote(v.key(i)) + ":" + written(v.value(i));
        kiln::fuzz::demand(v.find(v.key(i)) == &v.value(i), "a key is found, and there is one of it");
      }
      return "{" + out + "}";
  }
  return out;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string first;
  bool good = kiln::fuzz::accepts([&] { first = written(kiln::JsonDocument(std::string(kiln::fuzz::text(data, size)), "input").root()); });
  if (good) kiln::fuzz::demand(written(kiln::JsonDocument(first, "again").root()) == first, "what was written reads the same");
  return 0;
}

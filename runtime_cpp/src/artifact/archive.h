#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <string_view>

namespace kiln {

// The files of a zip archive of the plainest kind, as the exporter writes it: stored, one after another, no comments, nothing between or behind.
// Names -> bytes, views of `archive`. Error, which begins with `where`, for anything else.
std::map<std::string, std::string_view> list_archive(std::string_view archive, const std::string& where);

}  // namespace kiln

#include "store/maintenance/report.h"

#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <utility>

namespace torchcache::store {
namespace {

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    char escaped[8];
    if (c == '"' || c == '\\') result += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) {
      result += c;
    } else {
      std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(c));
      result += escaped;
    }
  }
  return result + '"';
}

struct Field {
  const char* name;
  std::string value;

  Field(const char* n, uint64_t number) : name(n), value(std::to_string(number)) {}
  Field(const char* n, bool truth) : name(n), value(truth ? "true" : "false") {}
  Field(const char* n, std::string json) : name(n), value(std::move(json)) {}
};

std::string object(std::initializer_list<Field> fields) {
  std::string result;
  for (const Field& field : fields) result += (result.empty() ? "" : ", ") + quoted(field.name) + ": " + field.value;
  return "{" + result + "}";
}

std::string to_json(const RowGroup& group) {
  return object({{"layout", quoted(group.layout)},
                 {"codec", quoted(group.codec == Codec::kZstd ? "zstd" : "raw")},
                 {"rows", group.rows},
                 {"bytes", group.bytes},
                 {"stored_bytes", group.stored_bytes}});
}

std::string to_json(const Damage& damage) {
  return object({{"kind", quoted(damage.kind)},
                 {"offset", damage.offset},
                 {"bytes", damage.bytes},
                 {"rows", damage.rows ? std::to_string(*damage.rows) : "null"}});
}

std::string to_json(const Waste& waste) { return object({{"duplicates", waste.duplicates}, {"holes", waste.holes}}); }

template <class Item>
std::string array(const std::vector<Item>& items) {
  std::string result;
  for (const Item& item : items) result += (result.empty() ? "" : ", ") + to_json(item);
  return "[" + result + "]";
}

}  // namespace

std::string to_json(const Summary& summary) {
  return object({{"idle", summary.idle},
                 {"bytes", summary.bytes},
                 {"index_bytes", summary.index_bytes},
                 {"blocks", summary.blocks},
                 {"groups", array(summary.groups)}});
}

std::string to_json(const Verification& verification) {
  return object({{"position", verification.position},
                 {"done", verification.done},
                 {"rows", verification.rows},
                 {"damage", array(verification.damage)}});
}

std::string to_json(const std::vector<Waste>& waste) { return array(waste); }

std::string to_json(const Compaction::Counts& counts) {
  return object({{"rows", counts.rows},
                 {"duplicates", counts.duplicates},
                 {"damaged", counts.damaged},
                 {"removed", counts.removed},
                 {"written", counts.written}});
}

}  // namespace torchcache::store

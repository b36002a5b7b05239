#include "store/admission.h"

#include <algorithm>

#include "store/format/format.h"
#include "store/format/index_file.h"

namespace torchcache::store {

uint64_t segment_cost() { return kHeaderBytes + kFooterBytes + kPageHeaderBytes; }

uint64_t row_cost(const Options& options, uint64_t layout_bytes, uint64_t row_bytes, uint64_t rows) {
  const uint64_t block_rows = std::max<uint64_t>(1, kBlockBytes / std::max<uint64_t>(1, row_bytes));
  const uint64_t blocks = (rows + block_rows - 1) / block_rows + 1;  // the last block's rest
  const uint64_t block = block_overhead(layout_bytes) + kCatalogBlockBytes + catalog_layout_bytes(layout_bytes) +
                         segment_cost();  // it may begin a segment
  const uint64_t table = row_table_bytes(options.zstd ? Codec::kZstd : Codec::kRaw);
  return row_bytes + table + kEntryBytes + 1 + (blocks * block + rows - 1) / rows;
}

Admission admit(const Options& options, uint64_t layout_bytes, uint64_t row_bytes, size_t rows, uint64_t used) {
  const uint64_t room = options.max_bytes - std::min(used, options.max_bytes);
  const auto cost_of = [&](size_t n) { return row_cost(options, layout_bytes, row_bytes, n); };
  Admission admission{rows, cost_of(rows)};
  admission.rows = std::min<uint64_t>(rows, room / admission.row_cost);
  while (admission.rows > 0 && admission.rows * (admission.row_cost = cost_of(admission.rows)) > room) --admission.rows;
  return admission;
}

}  // namespace torchcache::store

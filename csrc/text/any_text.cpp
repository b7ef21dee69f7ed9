// UTF-8 of Python's texts: the way for any processor, and the choice. See any_text.h.
#include "text/any_text.h"

#include "text/isa_level.h"

namespace herdkern::text {

namespace avx2 {
Utf8End write_utf8(const AnyText& text, uint8_t* out);
}
namespace vbmi2 {
Utf8End write_utf8(const AnyText& text, uint8_t* out);
}

namespace {

Utf8End write_any(const AnyText& text, uint8_t* out) {
  if (text.unit_bytes == 1) return write_utf8(static_cast<const uint8_t*>(text.data), text.size, out);
  if (text.unit_bytes == 2) return write_utf8(static_cast<const uint16_t*>(text.data), text.size, out);
  return write_utf8(static_cast<const uint32_t*>(text.data), text.size, out);
}

}  // namespace

Utf8Writer best_utf8_writer() {
#if defined(HK_X86)
  const IsaLevel level = isa_level();
  if (level >= IsaLevel::kVbmi2) return vbmi2::write_utf8;
  if (level >= IsaLevel::kAvx2) return avx2::write_utf8;
#endif
  return write_any;
}

}  // namespace herdkern::text

// What a thread holds while it uses the AMX tile unit; empty where the level has none.
#pragma once
#include <cstdint>

#include "common/simd.h"

#if defined(HK_ISA_AMX)
namespace herdkern::cpu::HK_ISA {

// The tile shapes of this thread while it lives: all eight are 16 rows of 64 bytes.
class AmxSession {
 public:
  AmxSession() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    const Config config;
    _tile_loadconfig(&config);
  }
  ~AmxSession() { _tile_release(); }
  AmxSession(const AmxSession&) = delete;
  AmxSession& operator=(const AmxSession&) = delete;
};

}  // namespace herdkern::cpu::HK_ISA
#endif

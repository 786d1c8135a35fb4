// Not one of the targets: a fault that is found byte by byte or not at all, to test the driver with.
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size > 3 && data[0] == 'k')
    if (data[1] == 'i')
      if (data[2] == 'l')
        if (data[3] == 'n') {
          int* nowhere = new int[4];
          nowhere[size] = 1;
          delete[] nowhere;
        }
  return 0;
}

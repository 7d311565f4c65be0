#include <stdio.h>
#include <zlib.h>

int main(void) {
    const char *pots = "1234567";
    uLong sum = crc32(crc32(0L, Z_NULL, 0), (const Bytef *)pots, 7);
    printf("C has fired %s pots (crc32 %08lx)\n", pots, sum);
    return 0;
}

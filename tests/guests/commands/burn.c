// burn MILLIONS: does nothing but compute, for so many million turns; a result that depends on each.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
    uint64_t turns = (argc > 1 ? strtoull(argv[1], NULL, 10) : 1) * 1000000;
    uint64_t x = 88172645463325252u;
    for (uint64_t turn = 0; turn != turns; turn++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
    }
    printf("%llu\n", (unsigned long long)x);
    return 0;
}

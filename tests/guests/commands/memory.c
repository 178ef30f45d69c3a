// Takes and touches memory until there is none left, says how much it had, and exits with 1.
#include <stdio.h>
#include <stdlib.h>

int main(void) {
    for (unsigned mebibytes = 0;; mebibytes++) {
        volatile char *block = malloc(1 << 20);
        if (!block) {
            printf("no more memory after %u MiB\n", mebibytes);
            return 1;
        }
        for (size_t i = 0; i < 1 << 20; i += 1024) block[i] = 1;
    }
}

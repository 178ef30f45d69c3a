// Takes and touches memory until there is none left, says how much it had, and exits with 1.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(void) {
    for (unsigned mebibytes = 0;; mebibytes++) {
        char *block = malloc(1 << 20);
        if (!block) {
            printf("no more memory after %u MiB\n", mebibytes);
            return 1;
        }
        memset(block, 1, 1 << 20);
    }
}

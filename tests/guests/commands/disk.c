// Fills its working directory: files of 1 MiB each, or one file that grows if it has an argument.
// Says how far it came and why it ended there, and exits with 1.
#include <errno.h>
#include <stdio.h>
#include <string.h>

#define BLOCK_BYTES (1 << 20)

static char block[BLOCK_BYTES];

int main(int argc, char **argv) {
    (void)argv;
    memset(block, 'x', sizeof block);
    FILE *file = NULL;
    for (unsigned mebibytes = 0;; mebibytes++) {
        char name[32];
        snprintf(name, sizeof name, "block-%u", mebibytes);
        if (!file) file = fopen(name, "wb");
        if (!file || fwrite(block, 1, sizeof block, file) != sizeof block || fflush(file)) {
            printf("no more disk after %u MiB: %s\n", mebibytes, strerror(errno));
            return 1;
        }
        if (argc == 1) {
            fclose(file);
            file = NULL;
        }
    }
}

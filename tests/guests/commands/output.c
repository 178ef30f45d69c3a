// Writes numbered lines to stdout for ever; to stderr if it has an argument. Exits with 1 when it cannot.
#include <stdio.h>

int main(int argc, char **argv) {
    (void)argv;
    FILE *out = argc > 1 ? stderr : stdout;
    for (unsigned long line = 0; fprintf(out, "line %lu of an output that has no end\n", line) > 0; line++) {}
    return 1;
}

// sleeper MS [TIMES]: prints a numbered line, then sleeps; TIMES times, else for ever.
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

int main(int argc, char **argv) {
    long ms = argc > 1 ? atol(argv[1]) : 100;
    long times = argc > 2 ? atol(argv[2]) : -1;
    for (long turn = 0; turn != times; turn++) {
        printf("tick %ld\n", turn);
        fflush(stdout);
        nanosleep(&(struct timespec){ms / 1000, ms % 1000 * 1000000}, NULL);
    }
    return 0;
}

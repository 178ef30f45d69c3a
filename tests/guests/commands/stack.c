// Calls itself until the stack is used up.
#include <stdio.h>

__attribute__((noinline)) static int deeper(int depth) {
    volatile int frame[4] = {depth};
    return frame[0] < 0 ? 0 : deeper(depth + 1) + frame[0];
}

int main(void) {
    printf("%d\n", deeper(0));
    return 0;
}

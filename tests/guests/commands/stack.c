// Calls itself until the stack is used up.
#include <stdio.h>

__attribute__((noinline)) static int deeper(int depth) {
    volatile char frame[16] = {(char)depth};
    return deeper(depth + 1) + frame[depth & 15];
}

int main(void) {
    printf("%d\n", deeper(0));
    return 0;
}

// Exits with 200, which is more than WASI hosts commonly pass on.
#include <stdlib.h>

int main(void) {
    exit(200);
}

// Writes a file for each argument, with the argument as its text; without arguments a few usual ones.
// Makes the directories that it needs. Then renames a file from /tmp to the working directory.
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

static int write_file(const char *path) {
    char part[4096];
    for (size_t i = 1; path[i] && i < sizeof part; i++) {
        if (path[i] != '/') continue;
        memcpy(part, path, i);
        part[i] = 0;
        if (mkdir(part, 0777) && errno != EEXIST) {
            perror(part);
            return 1;
        }
    }
    FILE *file = fopen(path, "wb");
    if (!file || fprintf(file, "%s\n", path) < 0 || fclose(file)) {
        perror(path);
        return 1;
    }
    printf("wrote %s\n", path);
    return 0;
}

int main(int argc, char **argv) {
    int failed = 0;
    for (int i = 1; i < argc; i++) failed |= write_file(argv[i]);
    if (argc > 1) return failed;
    const char *usual[] = {"top.txt", "a/b/c.txt", "a/d.txt", "/tmp/scratch.txt"};
    for (size_t i = 0; i < sizeof usual / sizeof *usual; i++) failed |= write_file(usual[i]);
    if (rename("/tmp/scratch.txt", "moved.txt")) {
        perror("rename");
        return 1;
    }
    printf("moved moved.txt\n");
    return failed;
}

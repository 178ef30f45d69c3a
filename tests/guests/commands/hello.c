// Prints its arguments, environment and directory, then copies stdin to stdout; one line on stderr.
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ENTRIES_MAX 1000

extern char **environ;

static int by_name(const void *left, const void *right) {
    return strcmp(*(char *const *)left, *(char *const *)right);
}

int main(int argc, char **argv) {
    for (int i = 0; i < argc; i++) printf("arg %s\n", argv[i]);
    for (char **pair = environ; pair && *pair; pair++) printf("env %s\n", *pair);
    char *names[ENTRIES_MAX];
    size_t count = 0;
    DIR *directory = opendir(".");
    for (struct dirent *entry; directory && count < ENTRIES_MAX && (entry = readdir(directory));)
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..")) names[count++] = strdup(entry->d_name);
    qsort(names, count, sizeof *names, by_name);
    for (size_t i = 0; i < count; i++) printf("file %s\n", names[i]);
    for (int byte; (byte = getchar()) != EOF;) putchar(byte);
    fprintf(stderr, "hello on stderr\n");
    return 0;
}

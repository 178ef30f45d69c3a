// Counts the lines and words of every file below the working directory, largest first.
//
//   count [--top N]     prints a table of the first N files (default: all)
//
// Writes report/summary.json, which `--artifact 'report/*'` keeps. Exit code 1: there was no file; 2: usage.

#include <dirent.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define FILES_MAX 100000
#define PATH_BYTES_MAX 4096
#define REPORT "report"

struct file {
    char *path;
    unsigned long lines, words, bytes;
};

static struct file *files;
static size_t file_count;

static void fail(const char *what, const char *path) {
    fprintf(stderr, "count: cannot %s %s: %s\n", what, path, strerror(errno));
    exit(1);
}

static void count(const char *path) {
    FILE *stream = fopen(path, "rb");
    if (!stream) fail("open", path);
    struct file file = {.path = strdup(path)};
    bool in_word = false;
    for (int byte; (byte = getc(stream)) != EOF; file.bytes++) {
        bool space = byte == ' ' || (byte >= '\t' && byte <= '\r');
        file.lines += byte == '\n';
        file.words += in_word && space;
        in_word = !space;
    }
    file.words += in_word;
    if (ferror(stream)) fail("read", path);
    fclose(stream);
    if (file_count == FILES_MAX) {
        fprintf(stderr, "count: more than %d files\n", FILES_MAX);
        exit(1);
    }
    if ((file_count & (file_count + 1)) == 0) { // grow at 0, 1, 3, 7, …: to twice the room each time
        files = realloc(files, (2 * file_count + 1) * sizeof *files);
        if (!files) fail("remember", path);
    }
    files[file_count++] = file;
}

// Links and whatever else is not a file or a directory are passed over.
static void walk(const char *directory) {
    DIR *entries = opendir(directory);
    if (!entries) fail("list", directory);
    for (struct dirent *entry; (entry = readdir(entries));) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        bool top = !strcmp(directory, ".");
        if (top && (!strcmp(entry->d_name, REPORT) || !strcmp(entry->d_name, "tmp"))) continue;
        char path[PATH_BYTES_MAX];
        int length = snprintf(path, sizeof path, "%s%s%s", top ? "" : directory, top ? "" : "/", entry->d_name);
        if (length >= (int)sizeof path) {
            errno = ENAMETOOLONG;
            fail("enter", directory);
        }
        struct stat status;
        if (lstat(path, &status)) fail("look at", path);
        if (S_ISDIR(status.st_mode)) walk(path);
        if (S_ISREG(status.st_mode)) count(path);
    }
    closedir(entries);
}

static int by_words_then_path(const void *left, const void *right) {
    const struct file *a = left, *b = right;
    if (a->words != b->words) return a->words < b->words ? 1 : -1;
    return strcmp(a->path, b->path);
}

static void write_json_string(FILE *out, const char *text) {
    putc('"', out);
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') fprintf(out, "\\%c", *text);
        else if ((unsigned char)*text < 0x20) fprintf(out, "\\u%04x", *text);
        else putc(*text, out);
    }
    putc('"', out);
}

static void write_report(void) {
    if (mkdir(REPORT, 0777) && errno != EEXIST) fail("make", REPORT);
    const char *path = REPORT "/summary.json";
    FILE *out = fopen(path, "wb");
    if (!out) fail("write", path);
    fprintf(out, "{\"files\": [");
    for (size_t i = 0; i < file_count; i++) {
        fprintf(out, "%s\n  {\"path\": ", i ? "," : "");
        write_json_string(out, files[i].path);
        fprintf(out, ", \"lines\": %lu, \"words\": %lu, \"bytes\": %lu}", files[i].lines, files[i].words, files[i].bytes);
    }
    fprintf(out, "\n]}\n");
    if (fclose(out)) fail("write", path);
}

int main(int argc, char **argv) {
    size_t top = FILES_MAX;
    if (argc == 3 && !strcmp(argv[1], "--top")) {
        char *end;
        top = strtoul(argv[2], &end, 10);
        if (*end || !*argv[2]) argc = -1;
    } else if (argc != 1) {
        argc = -1;
    }
    if (argc == -1) {
        fprintf(stderr, "usage: count [--top N]\n");
        return 2;
    }
    walk(".");
    if (!file_count) {
        fprintf(stderr, "count: there is no file here\n");
        return 1;
    }
    qsort(files, file_count, sizeof *files, by_words_then_path);
    write_report();
    printf("%8s %8s  %s\n", "lines", "words", "file");
    for (size_t i = 0; i < file_count && i < top; i++)
        printf("%8lu %8lu  %s\n", files[i].lines, files[i].words, files[i].path);
    fprintf(stderr, "count: %zu files; the rest is in " REPORT "/summary.json\n", file_count);
    return 0;
}

// Tries what no guest may do. One line for each attempt: `refused <what>: <errno>` or `STOLEN <what>`.
// Exits with 1 if anything was stolen. An argument is one more path to try to read.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <wasi/api.h>

#define FD_MAX 20

static int stolen;

static void report(const char *what, const char *detail, int got_it, const char *why) {
    stolen |= got_it;
    if (got_it) printf("STOLEN %s %s\n", what, detail);
    else printf("refused %s %s: %s\n", what, detail, why);
}

static void read_path(const char *what, const char *path) {
    char byte;
    int fd = open(path, O_RDONLY);
    int got = fd >= 0 && read(fd, &byte, 1) == 1;
    report(what, path, got, fd < 0 || !got ? strerror(errno) : "");
    if (fd >= 0) close(fd);
}

static void list_path(const char *path) {
    // The root of a guest is its workspace and `..` of it is nothing, so any answer is too much.
    struct stat status;
    int got = stat(path, &status) == 0;
    report("stat", path, got, strerror(errno));
}

static void read_through_link(const char *target, const char *link) {
    // Making the link may work; reading through it may not.
    unlink(link);
    if (symlink(target, link)) {
        report("link to", target, 0, strerror(errno));
        return;
    }
    read_path("read through a link to", link);
    char path[256];
    snprintf(path, sizeof path, "%s/hostname", link);
    read_path("read below a link to", path);
    snprintf(path, sizeof path, "%s/stolen", link);
    int fd = open(path, O_WRONLY | O_CREAT, 0666);
    report("write below a link to", target, fd >= 0, strerror(errno));
    if (fd >= 0) close(fd);
}

static void hard_link(const char *target) {
    int got = link(target, "hard") == 0;
    report("hard link to", target, got, strerror(errno));
}

static void write_path(const char *path) {
    int fd = open(path, O_WRONLY | O_CREAT, 0666);
    report("write", path, fd >= 0, strerror(errno));
    if (fd >= 0) close(fd);
}

// The preopened directories are ours; anything else from 3 on was left open by somebody.
static void use_descriptor(int fd) {
    char detail[16];
    snprintf(detail, sizeof detail, "%d", fd);
    __wasi_prestat_t directory;
    if (__wasi_fd_prestat_get(fd, &directory) == 0) return;
    char byte;
    struct stat status;
    int there = fstat(fd, &status) == 0 || read(fd, &byte, 1) >= 0 || write(fd, "x", 1) >= 0;
    report("descriptor", detail, there, strerror(errno));
}

// Preview 1 has no call that makes a socket; it can accept from one, send, receive and shut down.
static void use_socket(int fd) {
    char detail[16], byte = 'x';
    snprintf(detail, sizeof detail, "%d", fd);
    __wasi_fd_t accepted;
    __wasi_errno_t error = __wasi_sock_accept(fd, 0, &accepted);
    report("accept", detail, error == 0, strerror(error));
    __wasi_ciovec_t out = {(const uint8_t *)&byte, 1};
    __wasi_size_t sent;
    error = __wasi_sock_send(fd, &out, 1, 0, &sent);
    report("send", detail, error == 0, strerror(error));
    error = __wasi_sock_shutdown(fd, __WASI_SDFLAGS_WR);
    report("shutdown", detail, error == 0, strerror(error));
}

int main(int argc, char **argv) {
    const char *paths[] = {"/etc/passwd", "/etc/hostname", "/proc/self/environ", "/proc/1/environ", "/dev/kmsg",
                           "/var/lib/dpkg/status", "../../../../etc/passwd", "/../etc/passwd", "a/../../etc/passwd"};
    mkdir("a", 0777);
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) read_path("read", paths[i]);
    for (int i = 1; i < argc; i++) read_path("read", argv[i]);
    list_path("..");
    list_path("a/../..");
    const char *targets[] = {"/etc", "/etc/passwd", "/proc/self", "/proc/self/environ", "..", "../..", "a/../../..",
                             "../../../../../../etc"};
    for (size_t i = 0; i < sizeof targets / sizeof *targets; i++) read_through_link(targets[i], "door");
    unlink("door");
    hard_link("/etc/passwd");
    hard_link("../../../../etc/passwd");
    write_path("../escaped");
    write_path("/../escaped");
    for (int fd = 3; fd <= FD_MAX; fd++) use_descriptor(fd);
    for (int fd = 0; fd <= FD_MAX; fd++) use_socket(fd);
    puts(stolen ? "stolen" : "nothing stolen");
    return stolen;
}

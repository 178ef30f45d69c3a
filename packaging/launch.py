"""The first code of the zipapp: looks whether it can run here, unpacks itself safely, starts mvmci.

It unpacks into a cache, as shiv does and with shiv's code, and runs from there. It promises that the cache
is ours alone (whoever can write to it can run code as us), that it is whole (cleaners of cache folders
delete file by file), and that what prevents it is said in one sentence. The checks are kept readable for
old Pythons, which are to get a sentence too.

Every command and every unit starts here, so nothing is loaded that a whole cache does not need: shiv's
bootstrap takes as long as all of Python.
"""

import errno
import fcntl
import json
import os
import stat
import sys
import time

EXIT_VERSION = 8
EXIT_INTERNAL = 125
EXIT_INTERRUPTED = 130
LOCK_WAIT_S = 120
LOCK_PAUSE_S = 0.05
LOCK_SILENT_S = 1
GLIBC_MIN = (2, 28)
UID_UNKNOWN = 65534  # who is shown as the owner where a user namespace has no name for it
OWN_DIRECTORY = "set SHIV_ROOT to a directory of your own (mode 0700) on a disk that may hold programs"


def stop(message, hint, code=EXIT_INTERNAL):
    sys.stderr.write(f"Error: {message}\nhint: {hint}\n")
    sys.exit(code)


def check_host(machine, pythons):
    """Compiled modules are inside for one architecture, one C library and a few Pythons."""
    version = "{}.{}".format(*sys.version_info[:2])
    ours = sys.implementation.name == "cpython" and "t" not in sys.abiflags
    if version not in pythons or not ours:
        stop(
            f"this file runs on CPython {pythons[0]} to {pythons[-1]}, not on {sys.executable} ({version}).",
            f"start it with another one: python{pythons[-1]} {sys.argv[0]} …",
            EXIT_VERSION,
        )
    here = os.uname().machine
    if here != machine:
        stop(
            f"this file is for {machine} and this machine is {here}.",
            f"build it on a {here} machine: ./just zipapp",
            EXIT_VERSION,
        )
    try:
        name, glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        fits = name == "glibc" and tuple(int(part) for part in glibc.split(".")[:2]) >= GLIBC_MIN
    except (OSError, ValueError):
        fits = False
    if not fits:
        stop(
            "this file needs the GNU C library {}.{} or newer.".format(*GLIBC_MIN),
            "run it on a distribution that has it, such as Debian 10 or later (Alpine has another one)",
            EXIT_VERSION,
        )


def cache_root():
    """The directory that holds the caches, ours alone, made when missing."""
    root = os.environ.get("SHIV_ROOT")
    if not root:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "mvmci")
    root = os.path.realpath(os.path.expanduser(root))
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
        status = os.stat(root)
        noexec = os.statvfs(root).f_flag & os.ST_NOEXEC
    except OSError as error:
        stop(f"cannot make {root}, where mvmci unpacks itself: {error.strerror}.", OWN_DIRECTORY)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        whose = "can be written to by others" if status.st_uid == os.geteuid() else "belongs to another user"
        stop(f"{root}, where mvmci unpacks itself, {whose}, who could plant code there.", OWN_DIRECTORY)
    check_parents(root)
    if noexec:
        stop(f"{root}, where mvmci unpacks itself, is on a disk mounted noexec.", OWN_DIRECTORY)
    return root


def check_parents(root):
    """Whoever can rename a directory above the cache can put another in its place."""
    above = os.path.dirname(root)
    while True:
        status = os.stat(above)
        shared = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
        if shared or status.st_uid not in (0, os.geteuid(), UID_UNKNOWN):
            stop(
                f"{above} belongs to others, who could replace {root}, where mvmci unpacks itself.",
                OWN_DIRECTORY,
            )
        if above == os.path.dirname(above):
            return
        above = os.path.dirname(above)


def damaged(cache, files):
    """The files that the cache lacks, or has in another size."""

    def size(name):
        try:
            return os.stat(os.path.join(cache, name)).st_size
        except OSError:
            return None

    return [name for name, expected in files.items() if size(name) != expected]


def locked(path):
    """A descriptor that holds the lock at `path` until it is closed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    began = time.monotonic()
    said = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            waited = time.monotonic() - began
        if waited > LOCK_WAIT_S:
            stop(
                f"another process holds {path} and does not finish unpacking.",
                "end that process, then try again",
            )
        if waited > LOCK_SILENT_S and not said:
            sys.stderr.write("mvmci: waiting for another process that is unpacking it\n")
            said = True
        time.sleep(LOCK_PAUSE_S)


def mend(archive, cache, names):
    """Put single files back, each whole or not at all, under the feet of processes that run from here."""
    for name in names:
        path = os.path.join(cache, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        part = f"{path}.{os.getpid()}.part"
        with open(part, "wb") as file:
            file.write(archive.read(name))
        os.chmod(part, archive.getinfo(name).external_attr >> 16)
        os.replace(part, path)


def unpack(root, build_id, files):
    """Make the cache of this build whole. Costs one look at each file when it is."""
    import zipfile

    from _bootstrap import cache_path, extract_site_packages

    with zipfile.ZipFile(sys.argv[0]) as archive:
        cache = cache_path(archive, root, build_id)
        try:
            lock = locked(os.path.join(root, ".mvmci_lock"))
            try:
                if os.path.exists(os.path.join(str(cache), "site-packages")):
                    mend(archive, str(cache), damaged(str(cache), files))
                else:
                    extract_site_packages(archive, cache)
            finally:
                os.close(lock)
        except OSError as error:
            hint = "make room on that disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else OWN_DIRECTORY
            stop(f"cannot unpack mvmci into {cache}: {error.strerror}.", hint)


class Mender:
    """Puts the cache back under a process that runs from it: cleaners do not ask who still does.

    As the last finder of modules it is asked only for what was not found.
    """

    def __init__(self, archive, root, cache, build):
        self.archive, self.root, self.cache, self.build = os.path.abspath(archive), root, cache, build

    def find_spec(self, name, path=None, target=None):
        place = "site-packages/" + name.replace(".", "/")
        if not any(file.startswith((place + ".", place + "/")) for file in self.build["files"]):
            return None
        self.mend()
        from importlib.machinery import PathFinder

        PathFinder.invalidate_caches()
        return PathFinder.find_spec(name, path, target)

    def mend(self):
        """See that the cache is whole. Raises ImportError where that cannot be."""
        if not damaged(self.cache, self.build["files"]):
            return
        import zipfile

        umask = os.umask(0o077)
        try:
            os.makedirs(self.root, mode=0o700, exist_ok=True)
            lock = locked(os.path.join(self.root, ".mvmci_lock"))
            try:
                with zipfile.ZipFile(self.archive) as archive:
                    if json.loads(archive.read("build.json"))["id"] != self.build["id"]:
                        raise OSError(f"{self.archive} is another version by now")
                    mend(archive, self.cache, damaged(self.cache, self.build["files"]))
            finally:
                os.close(lock)
        except (OSError, SystemExit) as error:
            raise ImportError(f"{self.cache} was removed, and cannot be made again: {error}") from None
        finally:
            os.umask(umask)


def leave_path(entries):
    gone = {os.path.abspath(entry) for entry in entries}
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) not in gone]


def hold_streams():
    """What we open must not take the number of a standard stream that is closed."""
    number = 0
    while number <= 2:
        number = os.open(os.devnull, os.O_RDWR)
        os.set_inheritable(number, number <= 2)
    os.close(number)


def main():
    hold_streams()
    build = json.loads(__loader__.get_data("build.json").decode())  # type: ignore[name-defined]
    check_host(build["machine"], build["pythons"])
    umask = os.umask(0o077)  # the cache is ours alone, and what is made above it too
    root = cache_root()
    cache = os.path.join(root, "{}_{}".format(os.path.basename(os.path.realpath(sys.argv[0])), build["id"]))
    if damaged(cache, build["files"]):
        unpack(root, build["id"], build["files"])
    os.umask(umask & 0o077)  # one that keeps its owner from his own files means nothing
    os.environ["SHIV_ROOT"] = root
    # Compiled modules lie in our cache and litter nothing: without them each command is 0.1 s slower.
    sys.dont_write_bytecode = False
    # Nothing from elsewhere may stand before what was packed and tested together. The archive itself holds
    # no more packages, and who asks for the version of one would read its whole directory.
    told = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    leave_path(told + sys.argv[:1])
    installed = [entry for entry in sys.path if os.path.basename(entry) in ("site-packages", "dist-packages")]
    place = sys.path.index(installed[0]) if installed else len(sys.path)
    sys.path.insert(place, os.path.join(cache, "site-packages"))

    mender = Mender(sys.argv[0], root, cache, build)
    sys.meta_path.append(mender)
    from mvmci.cli import main as run
    from mvmci.system import processes

    processes.mend_program = mender.mend
    run()


try:
    main()
except KeyboardInterrupt:  # before the command line could take it, or after
    sys.exit(EXIT_INTERRUPTED)

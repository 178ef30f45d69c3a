"""Starts the zipapp: looks whether it can run here, unpacks itself safely, goes on with mvmci.

It runs isolated (`-I`), so that neither the environment nor the current directory says what is imported, and
by a Python that fits, if there is one on PATH. It unpacks into a cache and runs from there, as shiv does. It
promises that the cache is ours alone (whoever can write to it can run code as us), that it is whole (cleaners
of cache folders delete file by file), that it stays while somebody runs from it, that older ones go, and that
what prevents it is said in one sentence. The checks are kept readable for old Pythons, which get one too.

Every command and every unit starts here, so nothing is loaded that a whole cache does not need.
"""

import os
import sys

if not sys.flags.isolated:  # the next import could be of a module that somebody put into our way
    arguments = getattr(sys, "orig_argv", [sys.executable, *sys.argv])[1:]  # from 3.10 on with Python's own
    os.execv(sys.executable, [sys.executable, "-I", *arguments])  # noqa: S606

import errno
import fcntl
import json
import stat
import time

EXIT_VERSION = 8
EXIT_INTERNAL = 125
EXIT_INTERRUPTED = 130
LOCK_WAIT_S = 120
LOCK_PAUSE_S = 0.05
LOCK_SILENT_S = 1
ASK_S = 10
GLIBC_MIN = (2, 28)
UID_UNKNOWN = 65534  # who is shown as the owner where a user namespace has no name for it
CACHES = "mvmci_"  # and the id of the build
MARK = ".used"
KEPT = 2  # older builds that stay though nobody runs from them: an upgrade may go back
MTIME = 315532800  # of every file that is unpacked: who writes to one changes that
FULL = (errno.ENOSPC, errno.EDQUOT)
OWN_DIRECTORY = "set SHIV_ROOT to a directory of your own (mode 0700) on a disk that may hold programs"
FITS = (
    "import sys; sys.exit('{}.{}'.format(*sys.version_info[:2]) not in sys.argv[1:]"
    " or sys.implementation.name != 'cpython' or 't' in sys.abiflags)"
)


def stop(message, hint, code=EXIT_INTERNAL):
    sys.stderr.write(f"Error: {message}\nhint: {hint}\n")
    sys.exit(code)


def choose_python(pythons):
    """Go on with a Python that fits: this process becomes that one, unless it is that already."""
    version = "{}.{}".format(*sys.version_info[:2])
    if version in pythons and sys.implementation.name == "cpython" and "t" not in sys.abiflags:
        return
    import subprocess

    names = [f"python{one}" for one in reversed(pythons)]
    places = os.environ.get("PATH", os.defpath).split(os.pathsep)
    for python in (os.path.join(place, name) for name in names for place in places if os.path.isabs(place)):
        try:
            asked = [python, "-I", "-c", FITS, *pythons]
            if subprocess.call(asked, stderr=subprocess.DEVNULL, timeout=ASK_S) == 0:
                os.execv(python, [python, "-I", *sys.argv])  # noqa: S606
        except (OSError, subprocess.TimeoutExpired):
            continue
    stop(
        f"this file runs on CPython {pythons[0]} to {pythons[-1]}, not on {sys.executable} ({version}), "
        f"and PATH has no {', '.join(names)} that runs.",
        f"install one of them, or name yours: /path/to/{names[0]} {sys.argv[0]} …",
        EXIT_VERSION,
    )


def check_host(machine):
    """Compiled modules are inside for one architecture and one C library."""
    here = os.uname().machine
    if here == machine and sys.maxsize < 1 << 32:
        here = f"{machine} with a Python of 32 bits"
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
        base = os.environ.get("XDG_CACHE_HOME", "")
        base = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
        if not os.path.isabs(base):
            stop("this user has no home directory, where mvmci would unpack itself.", OWN_DIRECTORY)
        root = os.path.join(base, "mvmci")
    root = os.path.realpath(os.path.expanduser(root))
    check_parents(root)
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
        noexec = os.statvfs(root).f_flag & os.ST_NOEXEC
    except OSError as error:
        stop(f"cannot make {root}, where mvmci unpacks itself: {error.strerror}.", OWN_DIRECTORY)
    check_owner(root)
    if noexec:
        stop(f"{root}, where mvmci unpacks itself, is on a disk mounted noexec.", OWN_DIRECTORY)
    return root


def check_owner(folder):
    """Whoever can write to it can run code as us."""
    status = os.lstat(folder)
    if status.st_uid != os.geteuid():
        what = "belongs to another user"
    elif not stat.S_ISDIR(status.st_mode):
        what = "is no directory but may lead to one of others"
    elif status.st_mode & 0o022:
        what = "can be written to by others"
    else:
        return
    stop(f"{folder}, where mvmci unpacks itself, {what}, who could plant code there.", OWN_DIRECTORY)


def check_parents(root):
    """Whoever can rename a directory above the cache can put another in its place."""
    above = os.path.dirname(root)
    while True:
        try:
            status = os.stat(above)
        except FileNotFoundError:
            status = None  # it will be made, and ours
        except OSError as error:
            stop(f"cannot make {root}, where mvmci unpacks itself: {error.strerror}.", OWN_DIRECTORY)
        shared = status and status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
        if shared or (status and status.st_uid not in (0, os.geteuid(), UID_UNKNOWN)):
            stop(
                f"{above} belongs to others, who could replace {root}, where mvmci unpacks itself.",
                OWN_DIRECTORY,
            )
        if above == os.path.dirname(above):
            return
        above = os.path.dirname(above)


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


class Cache:
    """Where this build lies unpacked, whole for as long as somebody runs from it.

    It is mended under the processes that run from it: cleaners do not ask who still does. As the last finder
    of modules it is asked only for what was not found.
    """

    def __init__(self, root, archive, build):
        self.root, self.archive, self.id = root, os.path.abspath(archive), build["id"]
        self.files = dict(build["files"], **build["compiled"][sys.implementation.cache_tag])
        self.path = os.path.join(root, CACHES + self.id)
        self.mark = None

    def ensure(self):
        """Hold its mark, and see that it is whole. Costs one look at each file when it is. Raises OSError."""
        if self.hold() and not self.damaged():
            return
        umask = os.umask(0o077)
        try:
            os.makedirs(self.root, mode=0o700, exist_ok=True)
            lock = locked(os.path.join(self.root, ".mvmci_lock"))
            try:
                self.mend()
                self.hold()
                self.collect()
            finally:
                os.close(lock)
        finally:
            os.umask(umask)

    def hold(self):
        """Mark it as used for as long as we live. False where there is none."""
        path = os.path.join(self.path, MARK)
        while True:
            if self.mark is not None:
                try:
                    if os.path.samestat(os.fstat(self.mark), os.stat(path)):
                        return True
                except FileNotFoundError:
                    pass
                os.close(self.mark)  # it was removed, with all that lay beside it
                self.mark = None
            try:
                check_owner(self.path)
                self.mark = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                return False
            except OSError:
                return True  # nobody can collect it where nothing can be written
            fcntl.flock(self.mark, fcntl.LOCK_SH)
            os.utime(self.mark)

    def damaged(self):
        """The files that it lacks, or that are not as they were unpacked."""

        def whole(name, size):
            try:
                status = os.lstat(os.path.join(self.path, name))
            except OSError:
                return False
            return status.st_size == size and status.st_mtime == MTIME and stat.S_ISREG(status.st_mode)

        return [name for name, size in self.files.items() if not whole(name, size)]

    def mend(self):
        """Put single files there, each whole or not at all; nobody else does at this time."""
        import zipfile
        import zlib

        try:
            with zipfile.ZipFile(self.archive) as archive:
                if json.loads(archive.read("build.json").decode())["id"] != self.id:
                    raise OSError(errno.ESTALE, f"{self.archive} is another version by now")
                for name in self.damaged():
                    path = os.path.join(self.path, name)
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    self.put(path, archive.read(name), archive.getinfo(name).external_attr >> 16)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise OSError(errno.EIO, f"{self.archive} is damaged ({error})") from None

    def put(self, path, data, mode):
        part = path + ".part"
        try:
            with open(part, "wb") as file:
                file.write(data)
            os.chmod(part, mode)
            os.utime(part, (MTIME, MTIME))
            os.replace(part, path)
        except OSError:
            if os.path.exists(part):
                os.unlink(part)
            raise

    def collect(self):
        """Remove the builds that nobody runs from, but for the last ones. Nobody unpacks at this time."""

        def used(folder):
            try:
                return os.stat(os.path.join(folder, MARK)).st_mtime
            except OSError:
                return 0  # its unpacking was broken off

        found = [entry.path for entry in os.scandir(self.root) if entry.name.startswith(CACHES)]
        others = sorted((path for path in found if path != self.path), key=used, reverse=True)
        for path in others[KEPT:]:
            try:
                remove_unused(path)
            except OSError:
                pass  # of an older build: no reason not to start

    def find_spec(self, name, path=None, target=None):
        place = "site-packages/" + name.replace(".", "/")
        if not any(file.startswith((place + ".", place + "/")) for file in self.files):
            return None
        self.restore()
        from importlib.machinery import PathFinder

        PathFinder.invalidate_caches()
        return PathFinder.find_spec(name, path, target)

    def restore(self):
        """See that it is whole, long after the start. Raises ImportError where that cannot be."""
        try:
            self.ensure()
        except (OSError, SystemExit) as error:
            raise ImportError(f"{self.path} was removed, and cannot be made again: {error}") from None


def remove_unused(folder):
    """Raises BlockingIOError when somebody runs from it."""
    import shutil

    mark = os.open(os.path.join(folder, MARK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = os.path.join(os.path.dirname(folder), ".removed")  # in one step, for who looks at it now
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(folder, gone)
    finally:
        os.close(mark)
    shutil.rmtree(gone)


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
    choose_python(build["pythons"])
    check_host(build["machine"])
    umask = os.umask(0o077)  # the cache is ours alone, and what is made above it too
    cache = Cache(cache_root(), sys.argv[0], build)
    try:
        cache.ensure()
    except OSError as error:
        hint = "make room on that disk" if error.errno in FULL else OWN_DIRECTORY
        stop(f"cannot unpack mvmci into {cache.path}: {error.strerror}.", hint)
    os.umask(umask & 0o077)  # one that keeps its owner from his own files means nothing
    os.environ["SHIV_ROOT"] = cache.root
    # The archive holds no more packages, and who asks for the version of one would read its whole directory.
    sys.path[:] = [entry for entry in sys.path if entry != sys.argv[0]]
    # Nothing from elsewhere may stand before what was packed and tested together.
    installed = [entry for entry in sys.path if os.path.basename(entry) in ("site-packages", "dist-packages")]
    place = sys.path.index(installed[0]) if installed else len(sys.path)
    sys.path.insert(place, os.path.join(cache.path, "site-packages"))

    sys.meta_path.append(cache)
    try:
        from mvmci.cli import main as run
    except ImportError as error:
        if str(error.name).partition(".")[0] not in sys.stdlib_module_names:
            raise
        stop(
            f"{sys.executable} lacks the module {error.name} of the standard library.",
            "install all of Python (Debian has parts of it in python3-minimal, all in python3)",
            EXIT_VERSION,
        )
    from mvmci.system import processes

    processes.mend_program = cache.restore
    run()


def start():
    try:
        main()
    except KeyboardInterrupt:  # before the command line could take it, or after
        sys.exit(EXIT_INTERRUPTED)

"""Makes .venv with the pinned tools. Called by ./just, with nothing but the standard library there.

The stamp is written last, so an environment whose making was interrupted is made again. Two calls at
the same time follow each other, and the second finds the work done.

mvmci itself is linked in, not installed: what is edited here counts at once. pip cannot do that for a
package whose folder has another name (topologies, installed as mvmci_topologies).
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "mvmci-stamp"
LOCK = ROOT / ".venv.lock"
REQUIREMENTS = ROOT / "requirements" / "dev.txt"


def fail(message: str, hint: str) -> int:
    print(f"Error: {message}\nhint: {hint}", file=sys.stderr)
    return 125


def make() -> int:
    """An exit code: 0, or that of the step that failed."""
    try:
        import ensurepip  # noqa: F401  (Debian packs it apart)
        import venv
    except ImportError as error:
        return fail(
            f"{sys.executable} cannot make a virtual environment: {error}.",
            "on Debian and Ubuntu: apt-get install python3-venv",
        )
    print("Making .venv with the pinned tools; this takes about a minute.", file=sys.stderr, flush=True)
    venv.create(VENV, clear=True, with_pip=True, symlinks=True)
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "-qq"]
    install = ["install", "--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(REQUIREMENTS)]
    done = subprocess.run([*pip, *install], check=False)
    if done.returncode:
        return fail(
            "pip could not install the pinned tools into .venv (its reason is above).",
            "it needs a package index: see `pip config list`; then run ./just again",
        )
    (site,) = (VENV / "lib").glob("python*/site-packages")
    link(site)
    return 0


def link(site: Path) -> None:
    """Let `site` show mvmci's packages and entry points, as if it were installed there."""
    (site / "mvmci.pth").write_text(f"{ROOT}\n")
    (site / "mvmci_topologies").symlink_to(ROOT / "topologies")
    info = site / "mvmci-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mvmci\nVersion: 0\n")
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    with (info / "entry_points.txt").open("w") as file:
        for group, entries in groups.items():
            file.write(f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items()))


def main(stamp: str) -> int:
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if STAMP.exists() and STAMP.read_text() == stamp and (VENV / "bin" / "python").exists():
            return 0
        try:
            code = make()
        except (OSError, subprocess.CalledProcessError) as error:
            return fail(f"cannot make {VENV}: {error}.", "remove the folder .venv and run ./just again")
        if code == 0:
            STAMP.write_text(stamp)
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

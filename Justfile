# `./just` lists the recipes; `./just <recipe>` runs one, on a fresh clone too.

set shell := ["sh", "-euc"]

python := ".venv/bin/python"
# Most tests wait more than they compute: it takes that many at a time to keep two cores busy.
pytest := python + " -m pytest -n 6 --dist loadscope --no-loadscope-reorder"

# End-to-end tests and the demo run this file, not the source tree.
export MVMCI_ZIPAPP := justfile_directory() / "dist/mvmci.pyz"
# Whoever forbids Python to keep what it compiled would compile every test again in each run.
export PYTHONDONTWRITEBYTECODE := ""

[private]
default:
    @{{ just_executable() }} --list --unsorted

# Build the zipapp and run real WebAssembly with it (about 3 minutes from a fresh clone)
demo: zipapp examples
    sh examples/demo.sh

# Lint, and all tests but the long ones (8 minutes on two cores, 10 in a fresh clone with Docker)
test: lint zipapp examples
    {{ pytest }} -m "not soak"

# The long ones: faults at random, every access, containers, hosts and disks, programs of others, benchmarks
soak: zipapp examples
    {{ pytest }} -m soak

# Lint and unit tests (under a minute)
check: lint
    {{ python }} -m pytest -q -n 2 tests/unit

# ruff and mypy
lint:
    {{ python }} -m ruff check
    {{ python }} -m ruff format --check
    {{ python }} -m mypy

# Put the code into the house style
fmt:
    {{ python }} -m ruff check --fix
    {{ python }} -m ruff format

# Write dist/mvmci.pyz: one file for CPython 3.11 to 3.14 on this architecture
zipapp:
    {{ python }} packaging/make_zipapp.py

# Build the example modules and the guests of the tests from source, into dist/
examples:
    {{ python }} packaging/make_guests.py

# Measure, and print the tables; `--write` puts them into docs/figures.md and the README
bench *options: zipapp examples
    {{ python }} -m benchmarks {{ options }}

# Resolve the dependencies afresh and write requirements/
relock:
    {{ python }} -m venv build/relock
    build/relock/bin/python -m pip install --quiet uv
    for lock in run dev; do \
        case $lock in \
        run) set -- ; what="What travels in the zipapp" ;; \
        dev) set -- --group dev -c requirements/run.txt; what="What ./just puts into .venv: what travels in the zipapp, and the tools" ;; \
        esac; \
        { echo "# $what. Written by './just relock' from pyproject.toml; not by hand."; \
          build/relock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
            --only-binary :all: --no-emit-index-url --no-header --no-annotate pyproject.toml "$@"; \
        } >build/$lock.txt; \
        mv build/$lock.txt requirements/$lock.txt; \
    done

# Remove what was built; .venv stays
clean:
    rm -rf dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis

#!/bin/sh
# mvmci: a zip archive for Python behind these lines, which find a Python that can read it. Whether that one
# fits, and else which one does, its __main__.py sees.
for python in python3 @PYTHONS@; do
    if command -v "$python" >/dev/null 2>&1; then
        exec "$python" -I "$0" "$@"
    fi
done
echo "Error: this file runs on CPython @RANGE@, and PATH has none of python3 @PYTHONS@." >&2
echo "hint: install one, such as python3 of Debian 12 or later, or name yours: /path/to/python3 $0 …" >&2
exit 8

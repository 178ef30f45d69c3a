"""The first code of the zipapp, which any Python can read: `launch.py` is for a Python 3.

Who starts it with a Python 2 gets what the lines for the shell at its beginning find, or say.
"""

import os
import sys

if sys.version_info[0] < 3:  # noqa: UP036 (that is the question)
    os.execl("/bin/sh", "sh", *sys.argv)  # noqa: S606 (it is a script)

from launch import start

start()

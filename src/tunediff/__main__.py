"""``python -m tunediff``: the command line.

Python puts the current folder before what is installed; it is taken out again, as a file there that is called like a
library must not be imported in its place.
"""

import os
import sys

if sys.path and sys.path[0] == os.getcwd():
    del sys.path[0]

from tunediff.cli.main import main

main()

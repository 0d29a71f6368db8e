"""``python -m kdnas``."""

import os
import sys

import kdnas

# Python has put the current folder first, so that a file in it could take a library's place.
if not sys.flags.safe_path and not os.path.samefile(os.path.dirname(kdnas.__path__[0]), "."):
    del sys.path[0]

from kdnas.cli.main import main

raise SystemExit(main())

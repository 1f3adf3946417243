"""``python -m disha``: the same as the console script ``disha``."""

import sys

from disha.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""python -m learn: checks the reader's files in order, and stops at the first step that is not done."""

import sys

from learn.cli import main

if __name__ == "__main__":
    sys.exit(main())

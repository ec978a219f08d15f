"""Start the command line as `python -m foveola`, where its script is not on the path."""

import sys

from foveola.cli import main

if __name__ == "__main__":
    sys.exit(main())

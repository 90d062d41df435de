"""``python -m undercroft.cli``: how croft starts a daemon of its own installation."""

import sys

from undercroft.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

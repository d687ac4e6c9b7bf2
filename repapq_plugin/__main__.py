"""``python -m repapq_plugin`` is the command ``repapq``."""

import sys

from repapq_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""TODO cospadi.__main__."""

import sys

from cospadi.cli import main

sys.exit(main())

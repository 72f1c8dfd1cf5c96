import sys

from cospadi.cli import main

sys.exit(main())

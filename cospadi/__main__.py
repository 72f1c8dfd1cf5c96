import sys

from cospadi.pipeline import forks

code = forks.ask(sys.argv[1:])
if code is None:
    from cospadi.cli import main

    code = main()
sys.exit(code)

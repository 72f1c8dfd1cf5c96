import sys

from cospadi.cli import forkserver, main

code = forkserver.ask(sys.argv[1:])
sys.exit(main() if code is None else code)

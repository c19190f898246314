"""`python -m asgi_ws` is the command `asgi-ws`."""

import sys

from asgi_ws.cli import main

if __name__ == "__main__":
    sys.exit(main())

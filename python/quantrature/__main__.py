"""``python -m quantrature`` is the command ``quantrature``."""

import sys

from .cli import main

sys.exit(main())

"""``python -m synergen_ext`` is the command line ``synergen``."""

import sys

from .cli import main

sys.exit(main())

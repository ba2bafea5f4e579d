"""``python -m flowops``: the command line."""

import sys

from flowops.api.cli import main

sys.exit(main())

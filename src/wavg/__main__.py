"""``python -m wavg`` is the command ``wavg``."""

import sys

from wavg.cli import main

sys.exit(main())

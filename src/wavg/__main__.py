"""``python -m wavg`` is the command ``wavg``."""

import sys

from _wavg import main

sys.exit(main())

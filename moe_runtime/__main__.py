"""`python -m moe_runtime` is the command `moe-runtime`."""

import sys

from moe_runtime.cli import main

sys.exit(main())

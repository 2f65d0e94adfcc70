"""`python -m stpath_runtime` is the command `stpath`."""

import sys

from .cli import main

sys.exit(main())

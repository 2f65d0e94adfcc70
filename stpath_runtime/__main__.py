"""`python -m stpath_runtime` is the command `stpath`."""

import sys

from .cli.app import main

sys.exit(main())

"""`python -m herdkern`: the command line."""

import sys

from herdkern.cli import main

sys.exit(main())

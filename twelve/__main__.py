"""`python -m twelve`, where the command `twelve` is not on the path."""

import sys

from twelve.cli import main

sys.exit(main())

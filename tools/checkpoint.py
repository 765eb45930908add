#!/usr/bin/env python
"""Look at checkpoints, compare, check, average and consolidate them.

`megatrain checkpoint` as a script, for machines without the console script on their path:

    python tools/checkpoint.py --help
"""

import sys

from megatrain.cli.main import main

if __name__ == "__main__":
    main(["checkpoint", *sys.argv[1:]])

#!/usr/bin/env python
"""Models from and to other projects' formats.

`megatrain convert` as a script, for machines without the console script on their path:

    python tools/convert.py --help
"""

import sys

from megatrain.cli.main import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])

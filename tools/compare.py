"""Front door of `ddk compare`, for a clone: python tools/compare.py ..."""

import sys

from ddk_ds.commands.compare_command import main

if __name__ == "__main__":
    sys.exit(main())

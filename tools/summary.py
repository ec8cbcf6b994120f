"""Front door of `ddk summary`, for a clone: python tools/summary.py ..."""

import sys

from ddk_ds.commands.summary_command import main

if __name__ == "__main__":
    sys.exit(main())

"""Front door of `ddk status`, for a clone: python tools/status.py ..."""

import sys

from ddk_ds.commands.status_command import main

if __name__ == "__main__":
    sys.exit(main())

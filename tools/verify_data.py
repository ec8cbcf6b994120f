"""Front door of `ddk verify`, for a clone: python tools/verify_data.py ..."""

import sys

from ddk_ds.commands.verify_command import main

if __name__ == "__main__":
    sys.exit(main())

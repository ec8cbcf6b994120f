"""Front door of `ddk prepare`, for a clone: python tools/prepare_data.py ..."""

import sys

from ddk_ds.commands.prepare_command import main

if __name__ == "__main__":
    sys.exit(main())

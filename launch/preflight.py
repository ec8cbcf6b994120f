"""Front door of `ddk preflight`, for a clone: python launch/preflight.py ..."""

import sys

from ddk_ds.commands.preflight_command import main

if __name__ == "__main__":
    sys.exit(main())

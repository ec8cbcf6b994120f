"""Front door of `ddk generate`, for a clone: python tools/generate.py ..."""

import sys

from ddk_ds.commands.generate_command import main

if __name__ == "__main__":
    sys.exit(main())

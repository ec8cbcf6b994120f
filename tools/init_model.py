"""Front door of `ddk init`, for a clone: python tools/init_model.py ..."""

import sys

from ddk_ds.commands.init_command import main

if __name__ == "__main__":
    sys.exit(main())

"""Front door of `ddk evaluate`, for a clone: python tools/evaluate.py ..."""

import sys

from ddk_ds.commands.evaluate_command import main

if __name__ == "__main__":
    sys.exit(main())

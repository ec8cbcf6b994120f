"""Front door of `ddk export`, for a clone: python tools/export_hf.py ..."""

import sys

from ddk_ds.commands.export_command import main

if __name__ == "__main__":
    sys.exit(main())

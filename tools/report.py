"""Front door of `ddk report`, for a clone: python tools/report.py ..."""

import sys

from ddk_ds.commands.report_command import main

if __name__ == "__main__":
    sys.exit(main())

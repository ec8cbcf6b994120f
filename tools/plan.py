"""Front door of `ddk plan`, for a clone: python tools/plan.py ..."""

import sys

from ddk_ds.commands.plan_command import main

if __name__ == "__main__":
    sys.exit(main())

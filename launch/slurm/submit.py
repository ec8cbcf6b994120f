"""Front door of `ddk submit`, for a clone: python launch/slurm/submit.py ..."""

import sys

from ddk_ds.commands.submit_command import main

if __name__ == "__main__":
    sys.exit(main())

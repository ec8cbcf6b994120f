"""The script that the launcher starts on each rank: deepspeed launch/distill.py --config my.yaml [key=value ...]."""

import sys

from ddk_ds.commands.distill_rank import main

if __name__ == "__main__":
    sys.exit(main())

"""Front door of `ddk tokenizer`, for a clone: python tools/train_tokenizer.py ..."""

import sys

from ddk_ds.commands.tokenizer_command import main

if __name__ == "__main__":
    sys.exit(main())

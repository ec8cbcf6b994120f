"""Front door of `ddk cut-student`, for a clone: python tools/make_student.py ..."""

import sys

from ddk_ds.commands.cut_student_command import main

if __name__ == "__main__":
    sys.exit(main())

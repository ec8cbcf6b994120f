"""What a launcher on this host gives to ranks on others by ssh: arguments and variables, through a remote shell.

DeepSpeed 0.19.8 joins everything to one command line for pdsh and a shell on each host. It quotes an argument only if
that has a space, a variable's value by double quotes alone, and carries few variables.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

from ddk_ds.command_line import RANK_SCRIPT
from ddk_ds.errors import UserError
from ddk_ds.redact import redact

_ENCODED = "--encoded="
# Neither a shell nor pdsh, which replaces %n, finds anything in these.
_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]*")
_CARRIED = re.compile(
    r"(AWS|AZURE|CUDA|CURL|DS|FI|GLOO|GOOGLE|HF|IBV|KMP|MKL|MLFLOW|MV2|NCCL|OFI|OMP|PYTORCH|RDMAV|REQUESTS|S3|SSL"
    r"|TOKENIZERS|TORCH|TORCHINDUCTOR|TRANSFORMERS|TRITON|UCX|WANDB)_\w+|(HTTPS?|NO)_PROXY|https?_proxy|no_proxy"
)
# The launchers set the first on each host; the second names the file of variables itself.
_NOT_CARRIED = ("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE")
_SECRET_WORDS = {"TOKEN", "SECRET", "PASSWORD", "PASSWD", "KEY", "CONNECTION"}
# ssh does not notice by itself that a host is gone: pdsh would wait for it. A user's own options come first and count.
_SSH_ENDS = "-o ServerAliveInterval=15 -o ServerAliveCountMax=3"


def encoded(arguments: Sequence[str]) -> list[str]:
    """Return the arguments unchanged, or, if a shell would find something in them, one that holds them all."""
    if all(_PLAIN.fullmatch(argument) for argument in arguments):
        return list(arguments)
    return [_ENCODED + base64.urlsafe_b64encode(json.dumps(list(arguments)).encode()).decode()]


def decoded(arguments: Sequence[str]) -> list[str]:
    """Return the arguments as they were before `encoded`; a launcher may have added others."""
    result: list[str] = []
    for argument in arguments:
        if argument.startswith(_ENCODED):
            result += json.loads(base64.urlsafe_b64decode(argument.removeprefix(_ENCODED)))
        else:
            result.append(argument)
    return result


@contextmanager
def variables_of_hosts(environ: Mapping[str, str], command: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield the variables with which DeepSpeed's launcher, started by `command`, carries `environ` to other hosts.

    They name a file that exists inside the block; the user's own file is read into it and stays as it is. Empty if
    `command` names no hosts. Raises UserError for a path that a remote shell would take apart.
    """
    if not any(word.startswith("--hostfile=") for word in command):
        yield {}
        return
    pdsh = not any(word.startswith("--launcher=") and word != "--launcher=pdsh" for word in command)
    if pdsh:
        _check_paths()
    with NamedTemporaryFile("w", prefix="ddk-environment-") as file:  # readable by this user alone
        file.writelines(f"{line}\n" for line in [*_own_lines(environ, pdsh), *_lines_of_the_user(environ)])
        file.flush()
        ssh = f"{environ.get('PDSH_SSH_ARGS_APPEND', '')} {_SSH_ENDS}".strip()
        yield {"DS_ENV_FILE": file.name, "PDSH_SSH_ARGS_APPEND": ssh}


def _check_paths() -> None:
    for what, path in {"directory": Path.cwd(), "Python": sys.executable, "installation": RANK_SCRIPT}.items():
        if not _PLAIN.fullmatch(str(path)):
            raise UserError(
                f"--hostfile: this {what}, {path}, goes to a shell on each host, which would not take it as it is: use "
                "one of letters, digits and _@+=:,./- alone"
            )


def _own_lines(environ: Mapping[str, str], pdsh: bool) -> Iterator[str]:
    left_out = []
    for name, value in sorted(environ.items()):
        if not _CARRIED.fullmatch(name) or name in _NOT_CARRIED:
            continue
        if _is_secret(name, value) or not value.isprintable():
            left_out.append(name)
        else:
            yield f"{name}={_for_double_quotes(value) if pdsh else value}"
    if left_out:
        print(
            f"not carried to the hosts: {', '.join(left_out)}. Everyone there sees a command line, and a control "
            "character ends it: keep a secret in a file that all hosts share (docs/cluster.md)",
            file=sys.stderr,
        )


def _is_secret(name: str, value: str) -> bool:
    """Return True for a credential, but not for the path of a file with one."""
    words = name.upper().split("_")
    named = bool(_SECRET_WORDS & set(words)) and words[-1] not in ("FILE", "PATH")
    return named or redact(value) != value


def _for_double_quotes(value: str) -> str:
    """Return what DeepSpeed's double quotes, the remote shell and pdsh, which takes %% for %, make `value` of."""
    return re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")


def _lines_of_the_user(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of the files that DeepSpeed would read, which come last and so count."""
    for folder in (Path.home(), Path()):
        path = folder / environ.get("DS_ENV_FILE", ".deepspeed_env")
        lines = path.read_text().splitlines() if path.is_file() else []
        for line in filter(str.strip, lines):
            if "=" not in line:
                raise UserError(f"{path}: {redact(line)!r}: write NAME=value, one on each line")
            yield line

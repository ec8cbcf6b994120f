"""The commands: what `ddk`, tools/ and launch/ run."""

"""The `mskip` command."""

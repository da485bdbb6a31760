"""The command `diptych`."""

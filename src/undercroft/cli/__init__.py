"""The command `croft`."""

"""What exists: frozen records with spec and status, units, names and errors. No I/O, no clock."""

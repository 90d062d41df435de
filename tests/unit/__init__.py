"""Fast and pure tests, one directory per package of src/undercroft."""

"""`croft`, the command line. What is quick stays light: a command imports only its own module."""

"""REST, event stream, consoles and metrics over HTTP."""

"""Every verb: privilege, checks, one transaction. The only writer of specs."""

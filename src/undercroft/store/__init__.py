"""Where things are written down: versioned records, transactions, watches and leases."""

"""The agent that makes this host's VMs match their specs."""

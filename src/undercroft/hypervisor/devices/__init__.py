"""The devices of a virtual machine: a small class in a file of its own for each."""

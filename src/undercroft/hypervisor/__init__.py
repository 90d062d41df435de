"""One VM is one QEMU: command line, process and QMP. Knows nothing of the store."""

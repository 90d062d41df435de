"""Tests with a real QEMU and real processes."""

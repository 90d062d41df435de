"""Tests: they mirror src/."""

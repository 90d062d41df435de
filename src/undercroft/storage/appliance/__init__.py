"""Whole VMs in files: OVF descriptors, manifests, and the archives they travel in."""

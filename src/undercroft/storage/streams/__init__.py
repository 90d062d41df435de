"""Disks on their way in and out as streams, compressed and taken apart by all processors at once.

qemu-img does this with one: most of the time that an OVA takes goes into zlib.
"""

"""Builders of the images that Undercroft makes itself, from Debian packages."""

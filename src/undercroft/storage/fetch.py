"""Downloading an image's file over http or https: resumed, bounded, checked, retried."""

"""Datastores: where layers of volumes are kept, behind one small interface."""

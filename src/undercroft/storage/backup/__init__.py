"""Repositories of backups: chunks by their content, and manifests (docs/backup.md)."""

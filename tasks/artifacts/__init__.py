"""Artifacts: addresses, manifests, provenance."""

"""Merge: from several metadata collections to one deduplicated selection of image-text rows."""

"""Adopt: what people have already (shards, folders, tables, parquet with images) as shards."""

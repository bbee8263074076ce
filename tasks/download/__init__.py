"""Download: merged metadata in, webdataset shards out."""

"""Reading webdataset shards for training: their manifest, their order, their pixels."""

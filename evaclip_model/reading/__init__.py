"""Reading webdataset shards for training: their manifest, their order, their pixels."""

from evaclip_model.reading.samples import open_webdataset

__all__ = ["open_webdataset"]

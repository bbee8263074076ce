"""Training state on disk, addressed by parameter name, so that any number of ranks can take it up.

`step-N/` holds `shard-R.safetensors` of each rank that wrote it and `manifest.json`, which is
written last: where the manifest is, the checkpoint is whole.
"""

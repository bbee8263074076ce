"""Training state on disk, addressed by parameter name, so that any number of ranks can take it up:
`step-N/shard-R.safetensors` of each rank that wrote it, and last `manifest.json`, which makes it
whole."""

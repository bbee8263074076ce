"""Dataset: which of the verified samples are used, as a manifest with tombstones, and a card."""

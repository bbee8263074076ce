-- One partition: which row holds which entry.
FROM pairs

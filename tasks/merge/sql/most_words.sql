-- How many words the longest entry has.
SELECT coalesce(max(depth), 0) + 1 FROM read_parquet($prefixes, hive_partitioning = false)

-- One sidecar file: its columns under their keys, by partition.
SELECT hash::UUID AS key, ('0x' || left(hash, 4))::INTEGER % $partitions AS part, {columns}
FROM (
  SELECT md5({key}::VARCHAR) AS hash, *
  FROM read_parquet($path, hive_partitioning = false)
)
WHERE hash IS NOT NULL

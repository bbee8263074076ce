-- One metadata file: the sidecar key of every row, by partition.
SELECT {file}::INTEGER AS file, file_row_number AS row_in_file, hash::UUID AS key,
  ('0x' || left(hash, 4))::INTEGER % $partitions AS part
FROM (
  SELECT file_row_number, md5({key}::VARCHAR) AS hash
  FROM read_parquet($path, file_row_number = true, hive_partitioning = false)
)
WHERE hash IS NOT NULL

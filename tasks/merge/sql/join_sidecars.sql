-- One partition of a sidecar, joined with the rows of every metadata file. Of several rows with one
-- key the largest values count, as scores of what to leave out do.
SELECT wanted.file, wanted.row_in_file, {columns}
FROM read_parquet($wanted, hive_partitioning = false) AS wanted
JOIN (
  SELECT key, {largest} FROM read_parquet($sidecar, hive_partitioning = false) GROUP BY key
) AS sidecar USING (key)

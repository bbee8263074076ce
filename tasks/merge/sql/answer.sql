-- One partition of a sidecar: what it says about the rows of every metadata file.
SELECT asked.file, asked.row_in_file, {columns}
FROM read_parquet($asked, hive_partitioning = false) AS asked
JOIN (
  SELECT key, {largest} FROM read_parquet($told, hive_partitioning = false) GROUP BY key
) AS told USING (key)

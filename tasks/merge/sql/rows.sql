-- The rows of one parquet file with their numbers, and the columns its sidecars add.
(
  SELECT *{added}
  FROM read_parquet($path, file_row_number = true, hive_partitioning = false) AS alone
  {joins}
)

-- One range of the selection order, sorted.
CREATE OR REPLACE TEMP TABLE ordered AS
SELECT row_number() OVER (ORDER BY rank) - 1 AS place, * EXCLUDE (rank)
FROM read_parquet($paths, hive_partitioning = false)

-- One partition of keys: which row of every address stays, and its place in the selection order.
CREATE OR REPLACE TEMP TABLE deduped AS
WITH compared AS (
  SELECT source, file, row_in_file, key,
    CASE
      WHEN lag(source) OVER best_first = source THEN 'duplicate_in_source'
      WHEN row_number() OVER best_first > 1 THEN 'duplicate_across_sources'
    END AS reason
  FROM read_parquet($paths, hive_partitioning = false)
  WINDOW best_first AS (
    PARTITION BY key
    ORDER BY source, similarity DESC NULLS LAST, original_id NULLS LAST, file, row_in_file
  )
)
SELECT source, file, row_in_file, reason,
  CASE WHEN reason IS NULL THEN md5($seed::VARCHAR || ':' || key::VARCHAR)::UUID END AS rank
FROM compared

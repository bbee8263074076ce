-- One partition of keys: which row of every address stays, its place in the selection order, and
-- which other sources have it (bits of their numbers).
CREATE OR REPLACE TEMP TABLE deduped AS
WITH keys AS ({keys}),
compared AS (
  SELECT source, file, row_in_file, key, as_is,
    CASE
      WHEN lag(source) OVER best_first = source THEN 'duplicate_in_source'
      WHEN row_number() OVER best_first > 1 THEN 'duplicate_across_sources'
    END AS reason,
    bit_or(1::BIGINT << source) OVER (PARTITION BY key) - (1::BIGINT << source) AS others
  FROM keys
  WHERE NOT withdrawn
  WINDOW best_first AS (
    PARTITION BY key
    ORDER BY source, similarity DESC NULLS LAST, original_id NULLS LAST, file, row_in_file
  )
)
SELECT source, file, row_in_file, reason, others, as_is,
  CASE WHEN reason IS NULL THEN md5($seed::VARCHAR || ':' || key::VARCHAR)::UUID END AS rank
FROM compared
UNION ALL
SELECT source, file, row_in_file, 'withdrawn', 0, NULL, NULL FROM keys WHERE withdrawn

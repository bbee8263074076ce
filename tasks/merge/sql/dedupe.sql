-- One partition: which row of every address stays, and which other sources have the address (bits
-- of their numbers).
CREATE OR REPLACE TEMP TABLE deduped AS
WITH keys AS ({keys}),
compared AS (
  SELECT source, file, place, key, bucket,
    CASE
      WHEN lag(source) OVER best_first = source THEN 'duplicate_in_source'
      WHEN row_number() OVER best_first > 1 THEN 'duplicate_across_sources'
    END AS reason,
    bit_or(1::BIGINT << source) OVER (PARTITION BY key) - (1::BIGINT << source) AS others
  FROM keys
  WHERE dropped IS NULL AND NOT alone
  WINDOW best_first AS (
    PARTITION BY key
    ORDER BY source, similarity DESC NULLS LAST, original_id NULLS LAST, file, row_in_file
  )
)
FROM compared
UNION ALL
SELECT source, file, place, key, bucket, dropped, 0
FROM keys
WHERE dropped IS NOT NULL OR alone
